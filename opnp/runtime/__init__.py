"""Files, tensors, storage, devices, seeds and progress: what all other rooms build on."""
