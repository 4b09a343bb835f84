"""The PADD router, its record, its balance."""
