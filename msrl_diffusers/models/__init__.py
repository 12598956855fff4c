"""Networks that are saved, loaded and shared: one class, one file, each a diffusers ModelMixin."""
