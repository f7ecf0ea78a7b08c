"""What a run is asked to be: the typed schema, its composition, the refusal of wrong requests."""
