"""The study of the paper's claims."""
