"""What the scripts share. Arrows point one way: scripts -> nanonexus -> model.py."""
