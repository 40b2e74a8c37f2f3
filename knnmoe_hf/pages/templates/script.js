"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = window.localStorage.getItem("theme");
  } catch {
    // a page from disk may not have any storage
  }
  const show = () => {
    const isDark = chosen === null ? system.matches : chosen === "dark";
    root.dataset.theme = isDark ? "dark" : "light";
    button.textContent = isDark ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      window.localStorage.setItem("theme", chosen);
    } catch {
      // then the choice holds until the page is closed
    }
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
})();
(() => {
  const reading = (figure, line, chart) => {
    const marks = [...chart.querySelectorAll("[data-told]")];
    if (!marks.length) return;
    let active = null;
    const tell = (mark) => {
      if (!mark) return;
      if (active) active.classList.remove("active");
      active = mark;
      active.classList.add("active");
      line.textContent = active.dataset.told;
    };
    const middle = (mark) => {
      const box = mark.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    };
    const beside = (dx, dy) => {
      const [x, y] = middle(active);
      let best = null;
      let least = Infinity;
      for (const mark of marks) {
        const [other, below] = middle(mark);
        const along = (other - x) * dx + (below - y) * dy;
        const aside = Math.abs((other - x) * dy) + Math.abs((below - y) * dx);
        if (along > 0.5 && along + 3 * aside < least) {
          least = along + 3 * aside;
          best = mark;
        }
      }
      return best;
    };
    const counted = (step) => marks[Math.min(Math.max(marks.indexOf(active) + step, 0), marks.length - 1)];
    const moves = {
      ArrowRight: () => beside(1, 0),
      ArrowLeft: () => beside(-1, 0),
      ArrowDown: () => beside(0, 1),
      ArrowUp: () => beside(0, -1),
      PageDown: () => counted(1),
      PageUp: () => counted(-1),
      Home: () => marks[0],
      End: () => marks[marks.length - 1],
    };
    chart.tabIndex = 0;
    chart.setAttribute("aria-describedby", line.id);
    chart.addEventListener("focus", () => tell(active || marks[0]));
    chart.addEventListener("keydown", (event) => {
      if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      tell(active ? moves[event.key]() : marks[0]);
    });
    for (const what of ["pointerover", "click"]) {
      chart.addEventListener(what, (event) => tell(event.target.closest("[data-told]")));
    }
  };
  document.querySelectorAll("figure.plot").forEach((figure, place) => {
    const line = figure.querySelector(".told");
    if (!line) return;
    line.id = `told-${place}`;
    figure.querySelectorAll("svg.chart").forEach((chart) => reading(figure, line, chart));
  });
})();
