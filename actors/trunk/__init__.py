"""A Hugging Face mixture-of-experts model taken apart: its trunk, and the description of the experts that left it."""
