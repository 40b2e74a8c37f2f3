(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STEPS = 65535;
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
  const read = {
    int32: (text) => new Int32Array(bytes(text)),
    int16: (text) => new Int16Array(bytes(text)),
    float32: (text) => new Float32Array(bytes(text)),
    float64: (text) => new Float64Array(bytes(text)),
    // numbers from 0 to the largest in 16 bits; the last step stands for one that is not known
    fixed: (packed) => {
      const steps = new Uint16Array(bytes(packed.steps));
      return {
        length: steps.length,
        at: (place) => (steps[place] === STEPS ? NaN : (steps[place] / (STEPS - 1)) * packed.largest),
      };
    },
  };
  const experts = (packed) => ({ slots: packed.slots, ids: read.int16(packed.ids), weights: read.fixed(packed.weights) });
  const ids = read.int32(data.ids), tokens = read.int32(data.tokens);
  const logProb = read.float32(data.logProb), baseLogProb = read.float32(data.baseLogProb);
  const layers = data.layers.map((one) => ({
    layer: one.layer,
    neighbors: one.neighbors,
    rows: read.int32(one.rows),
    distances: read.fixed(one.distances),
    weights: read.fixed(one.weights),
    confidence: read.fixed(one.confidence),
    divergence: read.fixed(one.divergence),
    own: experts(one.own),
    mixed: experts(one.mixed),
  }));
  const references = {
    rows: read.int32(data.references.rows),
    examples: data.references.examples && read.float64(data.references.examples),
    positions: data.references.examples && read.int32(data.references.positions),
    passages: data.references.passages && data.references.passages.map(read[data.references.passageKind]),
    starts: data.references.starts,
    passageOf: data.references.passages && read.int32(data.references.passageOf),
  };
  const recalled = data.recalled && {
    slots: data.recalled.slots,
    tokens: read.int32(data.recalled.tokens),
    probabilities: read.fixed(data.recalled.probabilities),
    weight: read.fixed(data.recalled.weight),
  };

  const element = (name, attributes = {}, ...content) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== null) made.setAttribute(key, value);
    }
    made.append(...content);
    return made;
  };
  const number = (value, digits, sign = false) =>
    Number.isNaN(value) ? "unknown" : (sign && value > 0 ? "+" : "") + value.toFixed(digits);
  const mean = (values) => {
    const known = values.filter((value) => !Number.isNaN(value));
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
  };
  const gainOf = (token) => logProb[token] - baseLogProb[token];
  const text = (place) => (place < 0 ? "" : data.vocabulary[place][0]);
  const kind = (place) => (place < 0 ? "u" : data.vocabulary[place][1]);

  // a token's text as nodes: what is no text has a frame, ends of lines are seen
  const piece = (place, fallback) => {
    if (place < 0) return [element("span", { class: "odd" }, fallback)];
    const shown = text(place);
    if (kind(place) !== "t") return [element("span", { class: "odd" }, shown)];
    const parts = [];
    shown.split(/(\n|\t)/).forEach((part) => {
      if (part === "\n") parts.push(element("span", { class: "end", "aria-hidden": "true" }, "↵"), "\n");
      else if (part === "\t") parts.push(element("span", { class: "end", "aria-hidden": "true" }, "⇥"), "\t");
      else if (part !== "") parts.push(part);
    });
    return parts;
  };
  const named = (token) => (tokens[token] < 0 ? `id ${ids[token]}` : JSON.stringify(text(tokens[token])));

  // the text
  const holder = document.getElementById("text");
  const spans = [];
  data.sequences.map(read.int32).forEach((sequence, place) => {
    const block = element("div", {
      class: "sequence", role: "group", "aria-label": `Sequence ${place + 1} of ${data.sequences.length}`,
    });
    for (const token of sequence) {
      const span = element("span", { class: "t", role: "button", tabindex: "-1", "aria-pressed": "false" });
      span.append(...piece(tokens[token], String(ids[token])));
      span.token = token;
      span.place = spans.length;
      spans.push(span);
      block.append(span);
    }
    holder.append(block);
  });

  // the colours
  const controls = document.getElementById("controls");
  const legend = document.getElementById("legend");
  const layerChoice = document.getElementById("layer");
  const MOST = 1.5;  // nats of gain that have the full colour
  const LARGEST = Math.log(2);
  const valuesOf = (what, token) => {
    if (what === "gain") return gainOf(token);
    const chosen = layerChoice.value === "" ? layers : [layers[Number(layerChoice.value)]];
    return mean(chosen.map((one) => one[what].at(token)));
  };
  const swatch = (tone, share) => {
    const made = element("span", { class: "swatch" });
    made.style.background = `color-mix(in srgb, var(--${tone}) ${share}%, transparent)`;
    return made;
  };
  const strongest = 60;  // per cent of the colour, so that letters stay readable on it
  const colour = () => {
    const what = controls.elements.colour.value;
    layerChoice.disabled = what === "gain";
    for (const span of spans) {
      const value = valuesOf(what, span.token);
      const full = what === "gain" ? MOST : what === "divergence" ? LARGEST / 4 : 1;
      const share = Number.isNaN(value) ? 0 : Math.min(Math.abs(value) / full, 1) * strongest;
      span.style.setProperty("--share", `${share.toFixed(1)}%`);
      span.classList.toggle("less", what === "gain" && value < 0);
      span.classList.toggle("none", Number.isNaN(value));
      span.title = `${named(span.token)}: ${WORDS[what]} ${number(value, what === "divergence" ? 4 : 3, what === "gain")}`;
      span.setAttribute("aria-label", span.title);
    }
    const parts = {
      confidence: [swatch("memory", 0), "0", swatch("memory", strongest), "1: the neighbours decide alone"],
      gain: [
        swatch("trained", strongest), `−${MOST} nats and less`, swatch("memory", 0), "0",
        swatch("memory", strongest), `+${MOST} nats and more: likelier with the memory`,
      ],
      divergence: [swatch("memory", 0), "0", swatch("memory", strongest), `${(LARGEST / 4).toFixed(2)} nats and more`],
    };
    legend.replaceChildren(...parts[what].map((part) => (typeof part === "string" ? element("span", {}, part) : part)));
  };
  const WORDS = { confidence: "confidence", gain: "gain in nats", divergence: "change of routing in nats" };
  controls.addEventListener("change", colour);
  controls.addEventListener("submit", (event) => event.preventDefault());

  // a token's details
  const detail = document.getElementById("detail");
  const title = document.getElementById("detail-title");
  const content = document.getElementById("detail-content");
  const meter = (share, label, kind_ = "") => {
    const bar = element("i");
    bar.style.width = `${(100 * Math.max(0, Math.min(1, share || 0))).toFixed(1)}%`;
    return element("span", { class: `meter ${kind_}`, role: "img", "aria-label": label }, bar);
  };
  const expertsAt = (of, token) => {
    const found = new Map();
    for (let slot = 0; slot < of.slots; slot++) {
      const place = token * of.slots + slot;
      if (of.ids[place] >= 0) found.set(of.ids[place], of.weights.at(place));
    }
    return found;
  };
  const expertTable = (layer, token) => {
    const before = expertsAt(layer.own, token), after = expertsAt(layer.mixed, token);
    const all = [...new Set([...before.keys(), ...after.keys()])];
    const weight = (of, id) => of.get(id) || 0;
    all.sort((one, other) => weight(after, other) - weight(after, one) || weight(before, other) - weight(before, one) || one - other);
    const largest = Math.max(...all.map((id) => Math.max(weight(before, id), weight(after, id))), 1e-9);
    const table = element("div", { class: "experts" },
      element("span", { class: "head" }, "expert"), element("span", { class: "head pair" }, "weight before"),
      element("span", { class: "head pair" }, "weight after"));
    for (const id of all) {
      const [one, other] = [weight(before, id), weight(after, id)];
      table.append(
        element("span", {}, String(id)),
        meter(one / largest, `expert ${id} before: ${one.toFixed(3)}`, "before"), element("span", { class: "value before" }, one.toFixed(3)),
        meter(other / largest, `expert ${id} after: ${other.toFixed(3)}`), element("span", { class: "value after" }, other.toFixed(3)));
    }
    return table;
  };
  const passage = (place) => {
    if (!references.passages || references.passageOf[place] < 0) return null;
    const number_ = references.passageOf[place], ids_ = references.passages[number_];
    const own = references.positions[place] - references.starts[number_];
    const block = element("p", { class: "passage" });
    const [first, last] = [Math.max(own - data.context, 0), Math.min(own + data.context + 1, ids_.length)];
    for (let at = first; at < last; at++) {
      const made = element(at === own ? "mark" : "span", { class: at === own + 1 ? "following" : null }, ...piece(ids_[at], "?"));
      block.append(made);
    }
    return block;
  };
  const neighborList = (layer, token) => {
    const list = element("ol", { class: "neighbors" });
    for (let slot = 0; slot < layer.neighbors; slot++) {
      const at = token * layer.neighbors + slot, place = layer.rows[at];
      if (place < 0) continue;
      const about = [
        `weight ${number(100 * layer.weights.at(at), 1)} %`, `distance ${number(layer.distances.at(at), 3)}`, `row ${references.rows[place]}`,
      ];
      if (references.examples) {
        about.push(`example ${references.examples[place]}`);
        if (references.positions[place] >= 0) about.push(`position ${references.positions[place]}`);
      }
      const item = element("li", {}, element("span", { class: "about" }, about.join(" · ")));
      const around = passage(place);
      if (around) item.append(around);
      list.append(item);
    }
    return list;
  };
  const fill = (holder_, layer, token) => {
    holder_.append(element("h3", {}, "Experts before and after"), expertTable(layer, token));
    const shown = data.neighbors < data.allNeighbors ? `, the nearest ${data.neighbors} of ${data.allNeighbors}` : "";
    holder_.append(element("h3", {}, `Neighbours${shown}`));
    const list = neighborList(layer, token);
    holder_.append(list.children.length ? list : element("p", { class: "note" }, "This token looked nothing up here."));
    if (list.children.length) {
      holder_.append(element("p", { class: "note" }, "Distances are in units of the layer's median distance between neighbours."));
    }
  };
  const layerEntry = (layer, token) => {
    const confidence = layer.confidence.at(token);
    const entry = element("details", { class: "layer" },
      element("summary", {},
        element("b", {}, `Layer ${layer.layer}`), meter(confidence, `confidence ${number(confidence, 3)}`),
        element("span", { class: "value confidence" }, number(confidence, 3))));
    const inside = element("div");
    entry.append(inside);
    entry.addEventListener("toggle", () => {
      if (entry.open && !inside.children.length) fill(inside, layer, token);
    });
    return entry;
  };
  const figures = (token) => {
    const list = element("dl", { class: "figures" });
    const add = (name, value, class_) => list.append(element("dt", {}, name), element("dd", { class: class_ }, value));
    add("Token id", String(ids[token]));
    if (!Number.isNaN(logProb[token])) {
      add("Log-probability", `${number(logProb[token], 3)} nats with the memory, ${number(baseLogProb[token], 3)} without`);
      add("Gain", `${number(gainOf(token), 3, true)} nats`, "gain");
    }
    add("Confidence", `${number(mean(layers.map((one) => one.confidence.at(token))), 3)} in the mean of the layers`, "mean-confidence");
    add("Change of routing", `${number(mean(layers.map((one) => one.divergence.at(token))), 4)} nats (Jensen-Shannon), in the mean`);
    if (recalled) {
      const found = [];
      for (let slot = 0; slot < recalled.slots; slot++) {
        const at = token * recalled.slots + slot;
        if (recalled.tokens[at] >= 0) found.push(`${JSON.stringify(text(recalled.tokens[at]))} ${number(100 * recalled.probabilities.at(at), 1)} %`);
      }
      add("Recalled next tokens", found.length ? `${found.join(", ")}; they count ${number(100 * recalled.weight.at(token), 1)} % of the next token's distribution` : "none");
    }
    return list;
  };
  let current = null;
  const select = (span, isMoved) => {
    if (current) current.setAttribute("aria-pressed", "false");
    current = span;
    span.setAttribute("aria-pressed", "true");
    const back = element("button", { type: "button", id: "back" }, "To the text");
    back.addEventListener("click", () => { focusOn(current); current.scrollIntoView({ block: "center" }); });
    title.replaceChildren(element("span", {}, `Token ${span.place + 1}: ${named(span.token)}`), back);
    content.replaceChildren(figures(span.token), ...layers.map((layer) => layerEntry(layer, span.token)));
    detail.scrollTop = 0;
    if (isMoved) {
      detail.focus({ preventScroll: true });
      if (detail.getBoundingClientRect().top > window.innerHeight - 80) detail.scrollIntoView({ block: "start" });
    }
  };

  // the keyboard: one token can be reached by Tab, arrows move from there
  let reachable = null;
  const focusOn = (span) => {
    if (reachable) reachable.tabIndex = -1;
    reachable = span;
    span.tabIndex = 0;
    span.focus();
  };
  const onLine = (span, direction) => {
    const box = span.getBoundingClientRect(), middle = box.left + box.width / 2;
    let best = null, bestFar = Infinity, line = null;
    for (let place = span.place + direction; place >= 0 && place < spans.length; place += direction) {
      const other = spans[place].getBoundingClientRect();
      if (direction * (other.top - box.top) < 4) continue;
      if (line === null) line = other.top;
      if (Math.abs(other.top - line) > 4) break;
      const far = Math.abs(other.left + other.width / 2 - middle);
      if (far < bestFar) [best, bestFar] = [spans[place], far];
    }
    return best;
  };
  const KEYS = {
    ArrowRight: (span) => spans[span.place + 1], ArrowLeft: (span) => spans[span.place - 1],
    ArrowDown: (span) => onLine(span, 1), ArrowUp: (span) => onLine(span, -1),
    Home: () => spans[0], End: () => spans[spans.length - 1],
  };
  const tokenOf = (event) => event.target.closest(".t");
  holder.addEventListener("click", (event) => {
    const span = tokenOf(event);
    if (span) { focusOn(span); select(span, true); }
  });
  holder.addEventListener("keydown", (event) => {
    const span = tokenOf(event);
    if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      select(span, true);
    } else if (KEYS[event.key]) {
      event.preventDefault();
      const next = KEYS[event.key](span);
      if (next) focusOn(next);
    }
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && current) focusOn(current);
  });
  if (spans.length) {
    reachable = spans[0];
    reachable.tabIndex = 0;
  }
  colour();
})();
