"""Push, pull and search: adapters on the Hugging Face Hub or in a folder. The only importer of huggingface_hub."""
