"""The built-in sample: a small web archive of free manuals, and the scripts that made it."""
