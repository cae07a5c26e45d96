// For every page, also those that instant navigation brings.
document$.subscribe(({ body }) => {
  // arithmatex marks maths; KaTeX draws it.
  for (const element of body.querySelectorAll(".arithmatex")) {
    renderMathInElement(element, {
      delimiters: [
        { left: "\\(", right: "\\)", display: false },
        { left: "\\[", right: "\\]", display: true },
      ],
    })
  }
  // What scrolls must be reachable by keyboard.
  for (const element of body.querySelectorAll("pre > code, .md-typeset__scrollwrap, .katex-display")) {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0
  }
  // The theme's dialog has no name.
  body.querySelector(".md-search")?.setAttribute("aria-label", "Search")
})
