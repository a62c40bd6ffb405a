"""A model as one HTML file: its weights, and the engine and views that decode them offline."""

from fastvae.page.export import export_page

__all__ = ["export_page"]
