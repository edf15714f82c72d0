// Line charts in SVG, drawn here: several series, ticks at round numbers, a readout under the pointer or the arrow keys.
const NS = "http://www.w3.org/2000/svg";
const H = 320, LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 30;

function s(tag, props = {}, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round numbers from low to high. */
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999) ?? 10 * power;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Means that forget: what a noisy curve does. */
export function smoothed(points, share = 0.85) {
  let mean = 0, weight = 0;
  return points.map(([x, y]) => { mean = share * mean + (1 - share) * y; weight = share * weight + (1 - share); return [x, mean / weight]; });
}

/** A chart. series: [{name, points, colour (number of a CSS variable), dashed, dots}]; words: {x, empty}. `W` is how
    wide the place is, so that letters have the page's size. */
export function chart(series, words, W) {
  const drawn = series.filter((each) => each.points.length);
  const root = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", tabindex: "0" });
  if (!drawn.length) {
    root.setAttribute("aria-label", words.empty);
    root.append(s("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, words.empty));
    return root;
  }
  const xs = drawn.flatMap((each) => each.points.map(([x]) => x)), ys = drawn.flatMap((each) => each.points.map(([, y]) => y));
  const right = Math.max(...xs, 1), low = Math.min(...ys), high = Math.max(...ys), pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  const bottom = low >= 0 && low < (high - low) ? 0 : low - pad, top = high + pad;
  const px = (x) => LEFT + (x / right) * (W - LEFT - RIGHT), py = (y) => TOP + (1 - (y - bottom) / (top - bottom)) * (H - TOP - BOTTOM);
  for (const y of ticks(bottom, top, 5)) root.append(s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: py(y), y2: py(y) }), s("text", { x: LEFT - 8, y: py(y) + 4, "text-anchor": "end" }, String(y)));
  for (const x of ticks(0, right, W / 110).filter(Number.isInteger)) root.append(s("text", { x: px(x), y: H - 10, "text-anchor": "middle" }, String(x)));
  root.append(s("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
  for (const each of drawn) {
    const path = each.points.map(([x, y], at) => `${at ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    root.append(s("path", { class: `line c${each.colour}${each.dashed ? " dashed" : ""}`, d: path }));
    if (each.dots || each.points.length === 1) for (const [x, y] of each.points) root.append(s("circle", { class: `dot c${each.colour}`, cx: px(x), cy: py(y), r: 3 }));
  }
  root.setAttribute("aria-label", drawn.map((each) => `${each.name}: ${each.points.at(-1)[1].toFixed(3)} (${words.x} ${each.points.at(-1)[0]})`).join("; "));
  readout(root, drawn, px, words, right, W);
  return root;
}

function readout(root, drawn, px, words, right, W) {
  const line = s("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  const text = s("text", { class: "readout", y: TOP + 10, visibility: "hidden" });
  root.append(line, text);
  let at = right;
  const point = (x) => {
    at = Math.max(0, Math.min(right, x));
    const near = drawn.map((each) => ({ each, value: each.points.reduce((best, now) => (Math.abs(now[0] - at) < Math.abs(best[0] - at) ? now : best)) }));
    const where = near.reduce((best, now) => (Math.abs(now.value[0] - at) < Math.abs(best - at) ? now.value[0] : best), near[0].value[0]);
    line.setAttribute("x1", px(where)); line.setAttribute("x2", px(where));
    const left = px(where) > W / 2;
    text.replaceChildren(...[`${words.x} ${where}`, ...near.map(({ each, value }) => `${each.name} ${value[1].toFixed(3)}`)].map((word, row) => s("tspan", { x: px(where) + (left ? -8 : 8), dy: row ? 15 : 0, "text-anchor": left ? "end" : "start" }, word)));
    for (const each of [line, text]) each.setAttribute("visibility", "visible");
    return where;
  };
  const hide = () => { for (const each of [line, text]) each.setAttribute("visibility", "hidden"); };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    point((((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * right);
  });
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); point(at + step * Math.max(1, right / 50)); }
  });
}

/** Three bars: losses of base, adapter and merged model. */
export function bars(values, label) {
  const most = Math.max(...values.map((each) => each.value), 1e-9), width = 320, row = 26;
  const root = s("svg", { viewBox: `0 0 ${width} ${values.length * row}`, class: "bars", role: "img", "aria-label": label });
  values.forEach((each, at) => {
    const long = (each.value / most) * (width - 150);
    root.append(s("text", { x: 0, y: at * row + 16 }, each.name), s("rect", { class: `c${each.colour}`, x: 84, y: at * row + 4, width: long, height: 16, rx: 3 }), s("text", { x: 92 + long, y: at * row + 16 }, each.value.toFixed(3)));
  });
  return root;
}
