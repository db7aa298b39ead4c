"""Captioned emoji, in several styles, from clones of public collections of drawings."""
