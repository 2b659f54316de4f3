"""This library and its peers, timed on the same problems: ``make bench``."""
