"""What a method is made of: adapters, objectives, initialisers, and the published combinations (presets)."""
