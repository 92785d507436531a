"""What the notebooks measure: one module a notebook, cells and how they are computed."""
