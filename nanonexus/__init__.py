"""What the scripts share. Imports go one way: scripts -> nanonexus -> model.py."""
