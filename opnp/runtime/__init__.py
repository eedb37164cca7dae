"""What every room stands on: files, tensors, storage, devices, seeds and progress."""
