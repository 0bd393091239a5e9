"""Settings: base model, schema of a run, composition from files and overrides, and error messages."""
