"""What a run is asked to be: the typed schema, its composition and its refusal of wrong requests."""
