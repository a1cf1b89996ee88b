"""The adapter file: header, tensors, description, model card."""
