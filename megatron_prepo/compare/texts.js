"use strict";
// Shows the texts of a run: a step's window and rollouts, and two evaluations side by side.
// The data are JSON in script elements, parsed when they are first shown.  Every text of a model
// or a data set gets into the page as text, never as HTML.

const SHOWN = 20; // prompts at first, and with each click on "more"
const NATS = [0.1, 0.3, 1, 2, 3]; // lower ends of the colours 1 to 5
const SVG = "http://www.w3.org/2000/svg";

const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => sum(values) / values.length;
const number = (value, digits = 3) =>
  value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits)));
const signed = (value) =>
  value === null ? "–" : (value > 0 ? "+" : "") + number(value).replace("-", "−");
const level = (nats) => NATS.filter((low) => nats >= low).length;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// What is selected and open, which the page of a run in progress keeps when it reloads itself.
class State {
  constructor(name) {
    this.key = `${location.pathname} ${name}`;
    try {
      this.values = JSON.parse(sessionStorage.getItem(this.key)) || {};
    } catch {
      this.values = {}; // a browser that stores nothing
    }
  }
  get(name, otherwise) {
    return name in this.values ? this.values[name] : otherwise;
  }
  set(name, value) {
    this.values[name] = value;
    try {
      sessionStorage.setItem(this.key, JSON.stringify(this.values));
    } catch {
      return;
    }
  }
}

// The lines of one kind, by position; each is parsed once.
class Lines {
  constructor(root, kind) {
    this.scripts = [...root.querySelectorAll(`script[data-kind=${kind}]`)];
    this.steps = this.scripts.map((script) => Number(script.dataset.step));
    this.parsed = [];
  }
  get length() {
    return this.scripts.length;
  }
  at(i) {
    return (this.parsed[i] ??= JSON.parse(this.scripts[i].textContent));
  }
}

function choice(state, name, options, otherwise) {
  const select = element("select");
  for (const [value, words] of options) select.append(element("option", { value }, words));
  const stored = state.get(name, otherwise);
  select.value = options.some(([value]) => value === stored) ? stored : otherwise;
  select.addEventListener("change", () => state.set(name, select.value));
  return select;
}

function input(state, name, attributes) {
  const made = element("input", attributes);
  made.value = state.get(name, "");
  made.addEventListener("input", () => state.set(name, made.value));
  return made;
}

function labelled(words, ...inputs) {
  return element("label", {}, element("span", {}, words), ...inputs);
}

function toolbar(update, ...parts) {
  const form = element("form", { class: "tools" }, ...parts);
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  return form;
}

const has = (text, wanted) => text.toLowerCase().includes(wanted);
const isAbout = (prompt, wanted) =>
  has(prompt.id, wanted) || has(prompt.text, wanted) || has(prompt.answer, wanted);

const nameOf = (prompt) => `${prompt.step}/${prompt.id}`;

// Prompts, the first of them at once and more on demand; the body of one is made when it is opened.
function list(state, place, prompts, summary, body) {
  place.replaceChildren();
  const open = new Set(state.get("open", []));
  if (prompts.length && !prompts.some((prompt) => open.has(nameOf(prompt))))
    open.add(nameOf(prompts[0]));
  const more = element("button", { type: "button", class: "more" });
  let shown = 0;
  const add = () => {
    for (const prompt of prompts.slice(shown, shown + SHOWN)) {
      place.insertBefore(entry(prompt), more);
    }
    shown = Math.min(prompts.length, shown + SHOWN);
    more.textContent = `Show more: ${prompts.length - shown} of ${prompts.length}`;
    more.hidden = shown === prompts.length;
  };
  const entry = (prompt) => {
    const details = element("details", { class: "prompt" }, summary(prompt));
    const name = nameOf(prompt);
    details.dataset.name = name;
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(...body(prompt));
      details.open ? open.add(name) : open.delete(name);
      state.set("open", [...open]);
    });
    details.open = open.has(name);
    return details;
  };
  place.append(more);
  more.addEventListener("click", add);
  add();
}

function question(prompt) {
  return element(
    "div",
    { class: "question" },
    element("div", { class: "verbatim" }, prompt.text),
    element("div", { class: "facts" }, element("span", {}, `answer ${prompt.answer}`)),
  );
}

function facts(completion, more = []) {
  const words = [`reward ${number(completion.reward)}`, ...more, `${completion.tokens} tokens`];
  const end = completion.aborted ? "aborted" : completion.finished ? "stopped" : "truncated";
  const marks = [end];
  if (completion.graded !== "ok") marks.push(`grading: ${completion.graded}`);
  if (completion.trained === false)
    marks.push(completion.advantage === null ? "dropped" : "masked");
  return element(
    "div",
    { class: "facts" },
    ...words.map((text) => element("span", {}, text)),
    ...marks.map((text) => element("span", text === "stopped" ? {} : { class: "mark" }, text)),
  );
}

// A completion whose tokens are coloured by their entropy; a click on one shows its number.
function rollout(of) {
  const weights = [
    `advantage ${signed(of.advantage)}`,
    `weight ${number(of.weight)}`,
    `entropy ${number(of.mean_entropy)}`,
  ];
  const text = element("div", { class: "verbatim tokens" });
  of.pieces.forEach((piece, i) => {
    const nats = of.entropy && of.entropy[i];
    const shade = nats === null ? "" : `e${level(nats)}`;
    const token = element("span", { class: piece.includes("\n") ? `${shade} line` : shade }, piece);
    token.title = nats === null ? "entropy unknown" : `${nats} nats`;
    text.append(token);
  });
  const picked = element("output", { class: "facts" });
  text.addEventListener("click", (event) => {
    const i = [...text.children].indexOf(event.target);
    if (i >= 0)
      picked.textContent = `token ${i + 1} ${JSON.stringify(of.pieces[i])}: ${event.target.title}`;
  });
  return element("article", {}, facts(of, weights), text, picked);
}

function legend() {
  const ends = NATS.map((low) => String(low));
  const words = [
    `below ${ends[0]}`,
    ...ends.map((low, i) => (ends[i + 1] ? `${low} to ${ends[i + 1]}` : `${low} and more`)),
  ];
  return element(
    "p",
    { class: "legend note" },
    "Entropy of a token in nats, before the update: ",
    ...words.map((text, i) => element("span", { class: `e${i}` }, text)),
  );
}

// The window: all candidates by perplexity, those that were rolled out coloured, kept ones marked.
function strip(step, pick) {
  if (!step.ppl)
    return [element("p", { class: "note" }, "This method chooses without perplexity.")];
  const known = step.ppl.filter((ppl) => ppl !== null);
  const [low, high] = [known[0] ?? 1, known[known.length - 1] ?? 1];
  const height = (ppl) =>
    ppl === null ? 40 : high > low ? 6 + (34 * Math.log(ppl / low)) / Math.log(high / low) : 20;
  const svg = shape("svg", {
    viewBox: `0 0 ${step.ppl.length} 48`,
    preserveAspectRatio: "none",
    role: "img",
  });
  const chosen = new Set(step.chosen);
  const kept = new Map(step.prompts.map((prompt) => [prompt.position, prompt]));
  step.ppl.forEach((ppl, x) => {
    const h = height(ppl);
    const bar = shape("rect", { x: x + 0.1, y: 40 - h, width: 0.8, height: h });
    if (chosen.has(x)) bar.setAttribute("class", "chosen");
    const title = shape("title", {});
    title.textContent = `position ${x}, perplexity ${number(ppl, 4)}`;
    bar.append(title);
    svg.append(bar);
    if (kept.has(x)) {
      svg.append(shape("rect", { x, y: 43, width: 1, height: 5, class: "kept" }));
      bar.addEventListener("click", () => pick(kept.get(x)));
    }
  });
  const [first, last] = [step.chosen[0], step.chosen[step.chosen.length - 1]];
  const words =
    `${step.ppl.length} candidates by perplexity, ${number(low)} to ${number(high)}. Coloured: ` +
    `the ${step.chosen.length} rolled out, between positions ${first} and ${last}; marked below: ` +
    `the ${kept.size} whose rollouts are kept. Height: logarithm of the perplexity.`;
  svg.setAttribute("aria-label", words);
  return [svg, element("p", { class: "note" }, words)];
}

function showRollouts(root, lines, state) {
  const last = lines.length - 1;
  const options = [
    ["all", "all steps"],
    ...lines.steps.map((step) => [String(step), `step ${step}`]),
  ];
  const steps = choice(state, "step", options, String(lines.steps[last]));
  const selected = () => lines.steps.indexOf(Number(steps.value));
  const turn = (by) => {
    const button = element(
      "button",
      { type: "button", "aria-label": by < 0 ? "previous step" : "next step" },
      by < 0 ? "‹" : "›",
    );
    button.addEventListener("click", () => {
      const now = steps.value === "all" ? last + (by < 0) : selected();
      steps.value = String(lines.steps[Math.max(0, Math.min(last, now + by))]);
      state.set("step", steps.value);
      update();
    });
    return button;
  };
  const search = input(state, "search", { type: "search", placeholder: "text, answer or id" });
  const [low, high] = ["low", "high"].map((end) =>
    input(state, end, {
      type: "number",
      step: "any",
      "aria-label": `${end === "low" ? "least" : "largest"} reward`,
    }),
  );
  const count = element("p", { class: "note", role: "status" });
  const [figure, place] = [element("div", { class: "strip" }), element("div")];

  const summary = (prompt) => {
    const rewards = prompt.all.map((r) => r.reward);
    const position =
      prompt.position === undefined
        ? []
        : [`position ${prompt.position}`, `perplexity ${number(prompt.ppl, 4)}`];
    const words = [
      ...(steps.value === "all" ? [`step ${prompt.step}`] : []),
      ...position,
      `mean reward ${number(mean(rewards))}`,
    ];
    if (prompt.rollouts.length < rewards.length)
      words.push(`${prompt.rollouts.length} of ${rewards.length} match`);
    return element(
      "summary",
      {},
      element("strong", {}, prompt.id),
      element("span", { class: "facts" }, ...words.map((text) => element("span", {}, text))),
      element("span", { class: "first" }, prompt.text),
    );
  };

  const update = () => {
    const wanted = search.value.trim().toLowerCase();
    const within = (reward) =>
      (low.value === "" || reward >= Number(low.value)) &&
      (high.value === "" || reward <= Number(high.value));
    const shown =
      steps.value === "all" ? lines.steps.map((_, i) => lines.at(i)) : [lines.at(selected())];
    const kept = shown.flatMap((step) =>
      step.prompts.map((prompt) => ({
        ...prompt,
        step: step.step,
        all: prompt.rollouts,
        rollouts: prompt.rollouts.filter(
          (r) => within(r.reward) && (isAbout(prompt, wanted) || has(r.text, wanted)),
        ),
      })),
    );
    const found = kept.filter((prompt) => prompt.rollouts.length > 0);
    found.sort((a, b) => a.step - b.step || (a.position ?? 0) - (b.position ?? 0));
    const completions = sum(found.map((prompt) => prompt.rollouts.length));
    count.textContent = `${found.length} of ${kept.length} kept prompts, ${completions} completions`;
    list(state, place, found, summary, (prompt) => [
      question(prompt),
      ...prompt.rollouts.map(rollout),
    ]);
    const pick = (prompt) => {
      const entry = [...place.children].find(
        (e) => e.dataset.name === nameOf({ ...prompt, step: shown[0].step }),
      );
      if (entry) entry.open = true;
      if (entry) entry.scrollIntoView({ block: "nearest" });
    };
    figure.replaceChildren(...(shown.length === 1 ? strip(shown[0], pick) : []));
  };

  const tools = toolbar(
    update,
    labelled("Step", turn(-1), steps, turn(1)),
    labelled("Search", search),
    labelled("Reward from", low, "to", high),
  );
  root.append(tools, figure, legend(), count, place);
  update();
}

function showEvaluations(root, lines, state) {
  const name = (i) =>
    lines.at(i).when === "during"
      ? `step ${lines.steps[i]}`
      : `${lines.at(i).when}, step ${lines.steps[i]}`;
  const options = lines.steps.map((_, i) => [String(i), name(i)]);
  const [left, right] = [
    choice(state, "left", options, "0"),
    choice(state, "right", options, String(lines.length - 1)),
  ];
  const search = input(state, "search", { type: "search", placeholder: "text, answer or id" });
  const outcome = choice(
    state,
    "outcome",
    ["all", "better", "worse", "equal"].map((word) => [word, word]),
    "all",
  );
  const count = element("p", { class: "note", role: "status" });
  const place = element("div");
  const reward = (samples) => (samples ? mean(samples.map((c) => c.reward)) : null);

  const summary = (prompt) =>
    element(
      "summary",
      {},
      element("strong", {}, prompt.id),
      element(
        "span",
        { class: "facts" },
        element(
          "span",
          {},
          `mean reward ${prompt.sides.map((side) => number(reward(side))).join(" → ")}`,
        ),
      ),
      element("span", { class: "first" }, prompt.text),
    );

  const body = (prompt) => {
    const columns = prompt.sides.map((samples, i) =>
      element(
        "div",
        {},
        element("h4", {}, name(Number((i ? right : left).value))),
        ...(samples ?? []).map((c) =>
          element("article", {}, facts(c), element("div", { class: "verbatim" }, c.text)),
        ),
      ),
    );
    return [question(prompt), element("div", { class: "sides" }, ...columns)];
  };

  const update = () => {
    const wanted = search.value.trim().toLowerCase();
    const sides = [...new Set([left.value, right.value])].map((i) => lines.at(Number(i)));
    const samples = sides.map(
      (side) => new Map(side.prompts.map((prompt) => [prompt.id, prompt.completions])),
    );
    const prompts = new Map(
      sides.flatMap((side) => side.prompts.map((prompt) => [prompt.id, prompt])),
    );
    const all = [...prompts.values()].map((prompt) => ({
      ...prompt,
      step: "evaluation",
      sides: samples.map((of) => of.get(prompt.id)),
    }));
    const found = all.filter((prompt) => {
      const [before, after] = [
        reward(prompt.sides[0]),
        reward(prompt.sides[prompt.sides.length - 1]),
      ];
      const is = {
        all: true,
        better: after > before,
        worse: after < before,
        equal: after === before,
      };
      const texts = prompt.sides.flatMap((side) => (side ?? []).map((c) => c.text));
      return (
        is[outcome.value] && (isAbout(prompt, wanted) || texts.some((text) => has(text, wanted)))
      );
    });
    count.textContent = `${found.length} of ${all.length} kept prompts`;
    list(state, place, found, summary, body);
  };

  const tools = toolbar(
    update,
    labelled("Left", left),
    labelled("Right", right),
    labelled("Search", search),
    labelled("Mean reward", outcome),
  );
  root.append(tools, count, place);
  update();
}

for (const root of document.querySelectorAll(".texts")) {
  const { kind } = root.dataset;
  const state = new State(`${root.closest("section").id} ${kind}`);
  const show = { rollouts: showRollouts, evaluations: showEvaluations }[kind];
  show(root, new Lines(root, kind), state);
}
