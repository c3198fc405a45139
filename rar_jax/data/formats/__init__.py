"""Optional containers of encoded images, one module per format."""
