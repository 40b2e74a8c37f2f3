// What the browser test asks of a page: the body of a function of `frame`, `page` and `window`.
  const root = page.documentElement;
  const tokens = [...page.querySelectorAll(".t")];
  const press = (key) => page.activeElement.dispatchEvent(
    new window.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const reachable = tokens.filter((one) => one.tabIndex === 0).length;
  tokens[0].focus();
  press("ArrowRight"); press("ArrowRight"); press("ArrowLeft"); press("ArrowDown"); press("ArrowUp");
  const moved = tokens.indexOf(page.activeElement);
  press("End");
  const last = tokens.indexOf(page.activeElement) === tokens.length - 1;
  press("Home");
  for (let step = 0; step < CHOSEN; step++) press("ArrowRight");
  press("Enter");
  await wait(50);
  const inDetail = page.activeElement.id === "detail";
  const layers = [...page.querySelectorAll("details.layer")];
  layers[1].querySelector("summary").focus();
  const focused = page.activeElement === layers[1].querySelector("summary");
  layers[1].querySelector("summary").click();
  await wait(200);
  const words = (selector, within = page) => [...within.querySelectorAll(selector)].map((one) => one.textContent);
  const covered = [];
  const boxes = [...page.querySelectorAll("#controls label, h1, h2, #theme, .t, .layer > summary, dt, dd, #legend > *")]
    .map((one) => [one.textContent, [...one.getClientRects()]]);
  boxes.forEach(([text, own], i) => boxes.slice(i + 1).forEach(([other, theirs]) => {
    for (const a of own) for (const b of theirs) {
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 2 && y > 6 && !text.includes(other) && !other.includes(text)) covered.push([text, other]);
    }
  }));
  const colours = {};
  for (const what of ["confidence", "gain", "divergence"]) {
    const choice = page.querySelector(`input[value=${what}]`);
    choice.click();
    await wait(20);
    colours[what] = [tokens[CHOSEN].title, window.getComputedStyle(tokens[CHOSEN]).backgroundColor, page.getElementById("legend").textContent];
  }
  page.querySelector("input[value=confidence]").click();
  const select = page.getElementById("layer");
  select.value = "2";
  select.dispatchEvent(new window.Event("change", { bubbles: true }));
  await wait(20);
  const ofLayer = tokens[CHOSEN].title;
  layers[1].querySelector("summary").focus();
  press("Escape");
  const returned = tokens.indexOf(page.activeElement);
  const button = page.getElementById("theme");
  const ground = () => window.getComputedStyle(page.body).backgroundColor;
  const grounds = [ground()];
  button.click();
  grounds.push(ground());
  try { window.localStorage.clear(); } catch {}
  return {
    sideways: root.scrollWidth - root.clientWidth, reachable, moved, last, inDetail, focused, returned, covered, colours, ofLayer, grounds,
    title: page.getElementById("detail-title").textContent, figures: words("dd"), confidences: words(".layer .confidence"),
    before: words(".value.before", layers[1]), after: words(".value.after", layers[1]), about: words(".about", layers[1]),
    marks: words("mark", layers[1]), following: words(".following", layers[1]),
    shown: tokens.map((one) => one.textContent), elements: page.querySelectorAll("#text b, #text script, #detail script").length,
    small: [...page.querySelectorAll("#controls label, #theme, #layer, .layer > summary")].filter((one) => one.getBoundingClientRect().height < 32).length,
    outside: [...page.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > root.clientWidth + 1).length,
  };
