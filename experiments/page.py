"""An HTML page in one file: style, headings, tables, figures. Everything given as text is escaped here, once."""

import html

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b636d; --page: #ffffff; --card: #f4f5f7; --line: #dde1e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b0; --page: #14161a; --card: #1d2126; --line: #333a43; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 60rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
p.soft, figcaption, .tile span { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.tile { background: var(--card); border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
.tile span { font-size: .85rem; display: block; line-height: 1.35; }
figure { margin: .8rem 0; }
figure svg { display: block; height: auto; }
figcaption { font-size: .9rem; max-width: 46rem; margin-top: .3rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem 1.4rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .9rem; white-space: nowrap; }
td.number, th.number { text-align: right; }
tr.own td { font-weight: 600; }
pre { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; margin: .5rem 0; overflow-x: auto;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre mark { background: none; color: #3b82c4; font-weight: 600; }
details summary { cursor: pointer; color: var(--soft); margin-top: 1rem; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
"""


def page(title, parts):
  """A whole HTML document of parts that the functions below made."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
    + '\n'.join(parts)
    + '\n</body>\n</html>\n'
  )


def heading(text, level=2):
  """A heading."""
  return f'<h{level}>{html.escape(text)}</h{level}>'


def paragraph(text, *, is_soft=False):
  """A paragraph of text."""
  return f'<p{" class=soft" if is_soft else ""}>{html.escape(text)}</p>'


def tiles(items):
  """Headline figures: [(figure, what it is), ...]."""
  inner = ''.join(f'<div class="tile"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in items)
  return f'<div class="tiles">{inner}</div>'


def figure(svg, caption):
  """A picture, as experiments.pictures makes them, and what it shows."""
  return f'<figure aria-label="{html.escape(caption)}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def table(head, rows, *, own=()):
  """A table; columns after the first are figures and stand to the right. Rows whose numbers are in `own` are bold."""
  cells = lambda row, tag: ''.join(
    f'<{tag}{" class=number" if i else ""}>{html.escape(str(cell))}</{tag}>' for i, cell in enumerate(row)
  )
  body = ''.join(f'<tr{" class=own" if i in own else ""}>{cells(row, "td")}</tr>' for i, row in enumerate(rows))
  return f'<table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table>'


def facts(rows):
  """A table of (name, value) pairs."""
  body = ''.join(f'<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>' for name, value in rows)
  return f'<table><tbody>{body}</tbody></table>'


def sample(prompt, text):
  """A prompt, set off, and what a model wrote after it."""
  return f'<pre><mark>{html.escape(prompt)}</mark>{html.escape(text)}</pre>'


def details(summary, text):
  """Text that is shown on a click."""
  return f'<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>'
