"""`--dry-run`: what a start would do, computed from the model's config.json without weights or GPUs."""
