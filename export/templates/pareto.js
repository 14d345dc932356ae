// Accuracy against latency, size or throughput: axes, toggles, and a card with all numbers of a mark under pointer or keyboard focus.
// The static picture stays for print and for pages without script.
{
  const plot = document.getElementById("plot"), NAMESPACE = document.querySelector("svg")?.namespaceURI;
  const AXES = {
    latency: { title: "median time of a call, ms", of: (p, b) => p.latency[b], less: true },
    size: { title: "size of the file, MB", of: (p) => p.size, less: true },
    throughput: { title: "images a second", of: (p, b) => p.throughput[b], less: false },
  };
  const make = (tag, attributes = {}, ...children) => {
    const svg = ["svg", "g", "path", "circle", "rect", "text", "title"].includes(tag);
    const element = svg ? document.createElementNS(NAMESPACE, tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const drawn = DATA.points.filter((p) => p.accuracy && (p.size || Object.keys(p.latency).length || Object.keys(p.throughput).length));
  const usable = Object.keys(AXES).filter((axis) => drawn.some((p) => (axis === "size" ? p.size : Object.keys(p[axis]).length)));
  const start = () => {
    const batches = [...new Set(drawn.flatMap((p) => [...Object.keys(p.latency), ...Object.keys(p.throughput)]))].sort((a, b) => a - b);
    const choice = (name, label, options) => {
      const select = make("select", { name }, ...options.map(([value, text]) => make("option", { value }, text)));
      select.addEventListener("change", draw);
      return [make("label", {}, label + " ", select), select];
    };
    const [axisLabel, axis] = choice("x", "Against", usable.map((a) => [a, a]));
    const [batchLabel, batch] = choice("batch", "at batch", batches.map((b) => [b, b]));
    const toggles = (title, names) => {
      const boxes = new Map();
      const field = make("fieldset", {}, make("legend", {}, title));
      for (const [key, text, style] of names) {
        const box = make("input", { type: "checkbox", checked: "" });
        box.addEventListener("change", draw);
        boxes.set(key, box);
        const sample = style ? make("svg", { class: "sample " + style, viewBox: "0 0 10 10", "aria-hidden": "true" }, make("circle", { class: "dot", cx: 5, cy: 5, r: 4.5 })) : "";
        field.append(make("label", {}, box, sample, " " + text));
      }
      return [field, (key) => boxes.get(key).checked];
    };
    const first = (p, i, all) => all.findIndex((q) => q.subject === p.subject) === i;
    const [subjects, subjectOn] = toggles("Models", drawn.filter(first).map((p) => [p.subject, DATA.subjects[p.subject], p.style]));
    const [runtimes, runtimeOn] = toggles("Runtimes", [...new Set(drawn.map((p) => p.runtime))].map((r) => [r, DATA.runtimes[r] ?? r]));
    const stage = make("div", { class: "stage" }), card = make("div", { class: "card", hidden: "" }), front = make("p", { class: "small front", "aria-live": "polite" });
    const axes = make("div", { class: "fields" }, axisLabel, batchLabel);
    plot.append(axes, subjects, runtimes, stage, front);

    function draw() {
      const axis_ = AXES[axis.value], b = batch.value;
      batchLabel.hidden = axis.value === "size" || batches.length < 2;
      const points = drawn.filter((p) => subjectOn(p.subject) && runtimeOn(p.runtime) && axis_.of(p, b))
        .map((p) => ({ p, x: axis_.of(p, b), y: p.accuracy })).sort((q, r) => q.x.value - r.x.value);
      document.getElementById("plot-x").textContent = axis.value + (batchLabel.hidden ? "" : ` at batch ${b}`);
      document.getElementById("plot-way").textContent = `up and to the ${axis_.less ? "left" : "right"} is better`;
      card.hidden = true;
      if (!points.length) {
        stage.replaceChildren(make("p", { class: "none" }, "Nothing that is chosen has both numbers."));
        front.textContent = "";
        return;
      }
      picture(points, axis_);
    }

    function picture(points, axis_) {
      const width = Math.max(320, Math.min(912, stage.clientWidth || 912)), height = width < 600 ? 380 : 440;
      const [left, right, top, bottom] = [46, width - 12, 30, height - 44];
      const ends = (key) => points.flatMap(({ [key]: n }) => [n.value, n.low ?? n.value, n.high ?? n.value]);
      const xs = ends("x").filter((v) => v > 0), ys = ends("y");
      const ratio = Math.max((Math.max(...xs) / Math.min(...xs)) ** 0.08, 1.15);
      const [x0, x1] = [Math.log(Math.min(...xs) / ratio), Math.log(Math.max(...xs) * ratio)];
      const pad = (Math.max(...ys) - Math.min(...ys)) * 0.08 || 1;
      const [y0, y1] = [Math.min(...ys) - pad, Math.max(...ys) + pad];
      const X = (v) => left + ((Math.log(Math.max(v, Math.exp(x0))) - x0) / (x1 - x0)) * (right - left);
      const Y = (v) => bottom - ((v - y0) / (y1 - y0)) * (bottom - top);
      const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Accuracy against ${axis_.title}: ${points.length} marks, arrow keys move among them`, "font-size": 13, style: `max-width:${width}px` });
      const hidden = make("g", { "aria-hidden": "true" });
      const text = (words, x, y, anchor, kind) => hidden.append(make("text", { class: kind, x, y, "text-anchor": anchor }, words));
      let free = -Infinity;
      for (const v of logTicks(Math.exp(x0), Math.exp(x1))) {
        hidden.append(make("path", { class: "grid", d: `M${X(v)} ${top}V${bottom}` }));
        const words = v.toLocaleString("en-US", { maximumSignificantDigits: 3 }), half = words.length * 3.6;
        if (X(v) - half > free && X(v) + half < width) { text(words, X(v), bottom + 18, "middle", "tick"); free = X(v) + half + 6; }
      }
      const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((s) => (y1 - y0) / s <= 8) ?? 100;
      for (let v = Math.ceil(y0 / step) * step; v <= y1; v += step) {
        hidden.append(make("path", { class: "grid", d: `M${left} ${Y(v)}H${right}` }));
        text(String(+v.toFixed(1)), left - 6, Y(v) + 4, "end", "tick");
      }
      hidden.append(make("path", { class: "frame", d: `M${left} ${top}V${bottom}H${right}` }));
      text(`${axis_.title} (logarithmic)`, right, height - 6, "end", "label");
      text(`${DATA.accuracy} accuracy, %`, 2, 14, "start", "label");
      const best = frontOf(points, axis_.less);
      const path = best.map((q, i) => (i ? (axis_.less ? `H${X(q.x.value)}V${Y(q.y.value)}` : `V${Y(q.y.value)}H${X(q.x.value)}`) : `M${X(q.x.value)} ${Y(q.y.value)}`));
      hidden.append(make("path", { class: "frontier", d: path.join("") }));
      svg.append(hidden);
      const marks = points.map((q, i) => {
        const g = make("g", { class: `point ${q.p.style}`, role: "img", tabindex: i ? -1 : 0, "aria-label": rowsOf(q.p).map(([k, v]) => `${k} ${v}`).join("; ").replace(/^File /, "") });
        const [x, y] = [X(q.x.value), Y(q.y.value)];
        if (q.x.low !== null && q.x.high !== null) g.append(make("path", { class: "whisker", d: `M${X(q.x.low)} ${y}H${X(q.x.high)}` }));
        if (q.y.low !== null && q.y.high !== null) g.append(make("path", { class: "whisker", d: `M${x} ${Y(q.y.low)}V${Y(q.y.high)}` }));
        g.append(make("circle", { class: "reach", cx: x, cy: y, r: 13 }), shapeOf(q.p.shape, x, y, best.includes(q)));
        const show = () => showCard(q.p, x / width, y / height);
        g.addEventListener("mouseenter", show);
        g.addEventListener("mouseleave", () => { if (!stage.contains(document.activeElement)) card.hidden = true; });
        g.addEventListener("focus", () => { marks.forEach((m) => m.setAttribute("tabindex", m === g ? 0 : -1)); show(); });
        g.addEventListener("blur", () => (card.hidden = true));
        g.addEventListener("click", () => g.focus());
        g.addEventListener("keydown", (event) => {
          const to = { ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1, Home: 0, End: marks.length - 1 }[event.key];
          if (event.key === "Escape") card.hidden = true;
          if (to === undefined) return;
          event.preventDefault();
          marks[Math.max(0, Math.min(marks.length - 1, to))].focus();
        });
        return g;
      });
      svg.append(...marks);
      names(svg, points, best, X, Y, left, right);
      stage.replaceChildren(svg, card);
      const told = best.slice(0, 12).map((q) => q.p.label);
      front.textContent = `On the front: ${told.join("; ")}${best.length > 12 ? `; and ${best.length - 12} more` : ""}.`;
    }

    // The front's names, where they cover neither each other nor the frame; the others are a hover away.
    function names(svg, points, best, X, Y, left, right) {
      const boxes = points.map((q) => [X(q.x.value) - 7, Y(q.y.value) - 7, X(q.x.value) + 7, Y(q.y.value) + 7]);
      for (const { x, y } of points.length > 40 ? [] : points) {
        if (x.low !== null && x.high !== null) boxes.push([X(x.low), Y(y.value) - 1, X(x.high), Y(y.value) + 1]);
        if (y.low !== null && y.high !== null) boxes.push([X(x.value) - 1, Y(y.high), X(x.value) + 1, Y(y.low)]);
      }
      for (const q of best) {
        const wide = q.p.label.length * 7.1, x = X(q.x.value), y = Y(q.y.value);
        for (const [dx, dy, anchor] of [[11, 4, "start"], [-11, 4, "end"], [8, -12, "start"], [8, 20, "start"], [-8, -12, "end"], [-8, 20, "end"], [8, -28, "start"], [8, 36, "start"], [-8, -28, "end"]]) {
          const from = anchor === "start" ? x + dx : x + dx - wide;
          const box = [from, y + dy - 11, from + wide, y + dy + 4];
          const hits = boxes.some((o) => box[0] < o[2] && o[0] < box[2] && box[1] < o[3] && o[1] < box[3]);
          if (hits || box[0] < left || box[2] > right || box[1] < 18) continue;
          boxes.push(box);
          svg.append(make("text", { class: "name", "aria-hidden": "true", x: x + dx, y: y + dy, "text-anchor": anchor }, q.p.label));
          break;
        }
      }
    }

    function showCard(p, x, y) {
      card.replaceChildren(...rowsOf(p).map(([k, v], i) => (i ? make("div", {}, make("span", {}, k), " ", make("span", {}, v)) : make("b", {}, v))));
      card.hidden = false;
      const room = stage.clientWidth - card.offsetWidth;
      card.style.left = Math.max(0, Math.min(room, x * stage.clientWidth + (x > 0.5 ? -card.offsetWidth - 16 : 16))) + "px";
      card.style.top = Math.max(0, y * stage.clientHeight - (y > 0.5 ? card.offsetHeight : 0)) + "px";
    }

    plot.hidden = false;
    document.documentElement.classList.add("live");
    document.getElementById("plot-keys").hidden = false;
    draw();
    let width = stage.clientWidth;
    addEventListener("resize", () => { if (stage.clientWidth !== width) { width = stage.clientWidth; draw(); } });
  };

  // All numbers of a mark, with their intervals.
  const rowsOf = (p) => {
    const rows = [["File", p.label]];
    const add = (name, n) => n && rows.push([name, n.text]);
    add(`${DATA.accuracy} accuracy`, p.accuracy);
    for (const [b, n] of Object.entries(p.latency)) add(`Latency, batch ${b}`, n);
    for (const [b, n] of Object.entries(p.throughput)) add(`Throughput, batch ${b}`, n);
    add("Size", p.size);
    add("Peak memory", p.memory);
    add("Least cosine", p.cosine);
    add("Lost to FP32", p.loss.fp32);
    add("Lost to the teacher", p.loss.teacher);
    return rows;
  };
  const frontOf = (points, less) => {
    const order = [...points].sort((a, b) => (less ? a.x.value - b.x.value : b.x.value - a.x.value) || b.y.value - a.y.value);
    const best = [];
    for (const q of order) if (!best.length || q.y.value > best.at(-1).y.value) best.push(q);
    return best;
  };
  const logTicks = (low, high) => {
    const all = (steps) => {
      const found = [];
      for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) for (const s of steps) found.push(s * 10 ** k);
      return found.filter((v) => v >= low && v <= high);
    };
    return [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(all).find((f) => f.length <= 8) ?? all([1]);
  };
  const shapeOf = (shape, x, y, best) => {
    const kind = best ? "dot" : "dot dim";
    const path = { square: `M${x - 5} ${y - 5}h10v10h-10z`, diamond: `M${x} ${y - 7}l7 7l-7 7l-7 -7z`, triangle: `M${x} ${y - 6.5}l6.5 11.5h-13z`, wedge: `M${x} ${y + 6.5}l6.5 -11.5h-13z` }[shape];
    return path ? make("path", { class: kind, d: path }) : make("circle", { class: kind, cx: x, cy: y, r: 5.5 });
  };
  if (plot && usable.length) start();
}
