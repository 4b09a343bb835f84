"""The only importer of deepspeed."""
