"""Figures as all reports draw them. Not through pyplot: no global state, no display."""

import io
import pathlib

import matplotlib.figure

from gemma4_jax import metrics


def grid(width: float, height: float, columns: int = 1, rows: int = 1, **kwargs):
  """(figure, axes [rows, columns]); width and height in inches, `kwargs` as `Figure.subplots` takes them."""
  figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
  for axis in axes.flat:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
  return figure, axes


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a PNG beside `path`, then renames: a reader never sees half a picture."""
  png = io.BytesIO()
  figure.savefig(png, dpi=150, format='png')
  metrics.write_bytes(path, png.getvalue())
  return path
