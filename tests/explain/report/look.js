// What the browser test asks of a page: the body of a function of `frame`, `page` and `window`.
  const root = page.documentElement;
  const seen = (one) => one.getClientRects().length > 0 && (one.closest("details:not([open])") === null || one.tagName === "SUMMARY");
  const figures = [...page.querySelectorAll("figure.plot")].filter((one) => one.querySelector(".told") && seen(one));
  const told = [];
  for (const figure of figures) {
    const chart = [...figure.querySelectorAll("svg.chart")].find(seen);
    const line = figure.querySelector(".told");
    const press = (key) => chart.dispatchEvent(new window.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    const marks = [...chart.querySelectorAll("[data-told]")];
    const how = line.textContent;
    chart.focus();
    const reachable = page.activeElement === chart;
    const first = line.textContent;
    press("ArrowRight"); press("ArrowDown");
    const moved = chart.querySelector(".active");
    const beside = moved !== marks[0] && line.textContent === moved.dataset.told;
    press("Home");
    for (let step = 0; step < 3; step++) press("PageDown");
    const counted = line.textContent === marks[Math.min(3, marks.length - 1)].dataset.told;
    press("End");
    const last = line.textContent === marks[marks.length - 1].dataset.told;
    const middle = marks[Math.floor(marks.length / 2)];
    middle.dispatchEvent(new window.PointerEvent("pointerover", { bubbles: true }));
    const pointed = line.textContent === middle.dataset.told && middle.classList.contains("active");
    middle.querySelector("*")?.dispatchEvent(new window.MouseEvent("click", { bubbles: true }));
    told.push({
      title: figure.querySelector("figcaption").textContent, how, first, isFirst: first === marks[0].dataset.told,
      all: marks.map((one) => one.dataset.told), reachable, beside: beside || marks.length < 2, counted, last, pointed,
      active: chart.querySelectorAll(".active").length,
    });
  }
  const folded = [...page.querySelectorAll("details:not([open])")];
  folded.forEach((one) => one.querySelector("summary").click());
  await wait(50);
  const covered = [];
  const boxes = [...page.querySelectorAll("h1, h2, figcaption, p, li, summary, th, td:not(.picture), #theme, nav a")].filter(seen)
    .map((one) => [one, one.getBoundingClientRect()]);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    if (one.closest("table") && other.closest("table") || one.contains(other) || other.contains(one)) return;
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 4) covered.push([one.textContent, other.textContent]);
  }));
  const letters = [...page.querySelectorAll("svg.chart")].filter(seen).flatMap((chart) => {
    const texts = [...chart.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
    const inside = chart.getBoundingClientRect();
    return texts.flatMap(([text, a], i) => [
      ...(a.left < inside.left - 1 || a.right > inside.right + 1 || a.bottom > inside.bottom + 1 ? [[text, "outside"]] : []),
      ...texts.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2,
      ).map(([other]) => [text, other]),
    ]);
  });
  const scrolled = (one) => one.closest(".scroll") !== null;
  const button = page.getElementById("theme");
  const ground = () => window.getComputedStyle(page.body).backgroundColor;
  const grounds = [ground()];
  button.click();
  grounds.push(ground());
  try { window.localStorage.clear(); } catch {}
  return {
    sideways: root.scrollWidth - root.clientWidth, told, covered, letters, grounds, opened: folded.every((one) => one.open),
    outside: [...page.querySelectorAll("body *")].filter((one) => seen(one) && !scrolled(one) && one.getBoundingClientRect().right > root.clientWidth + 1)
      .map((one) => one.outerHTML.slice(0, 80)),
    strange: page.querySelectorAll("main b, main script").length,
  };
