"""What any detector needs besides the detector: files, devices, data formats, pages. Imports no top-level module."""
