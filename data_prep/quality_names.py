"""Names of the quality filters in FineWeb's order; apart from their code so that checking a config imports
no spaCy.
"""

QUALITY = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
