"""
Pages for people: a `document` as HTML (`page`) and as Markdown (`markdown`), with plots as SVG.

Whoever has something to show makes a `Document`. Plots are made by `charts`, with `axes`, `placement` and `svg`.
"""
