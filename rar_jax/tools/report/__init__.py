"""Write one HTML page about a work directory."""
