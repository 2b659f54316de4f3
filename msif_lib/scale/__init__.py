"""Above the method: more than one process or machine."""
