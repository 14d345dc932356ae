// Which file should I ship? The same rules, words and order as export/reporting/advice.py; a test holds the two to equal answers.
// Measured numbers come with their text: nothing is rounded here.
function advise(candidates, wanted, name) {
  const VERSUS = { fp32: "the same model in FP32", teacher: "the teacher" };
  const RUNTIMES = { onnx: "ONNX", openvino: "OpenVINO", rtx: "TensorRT-RTX", trt: "TensorRT", torch: "PyTorch" };
  const w = { latency_ms: null, size_mb: null, loss_points: null, versus: "fp32", runtime: "any", batch: null, prefer: "accuracy", ...wanted };
  const files = candidates.filter((c) => c.ships);
  const batch = String(w.batch ?? files.flatMap((c) => Object.keys(c.latency)).sort((a, b) => a - b)[0] ?? "");
  const latencyOf = (c) => c.latency[batch] ?? null;

  const limit = (what, number, most, unit, scale) => {
    if (!number) return { reason: `its ${what} was not measured`, excess: Infinity };
    if (most === null) return { excess: 0 };
    const asked = `${most} ${unit}`;
    if (number.value <= most) {
      const beyond = number.high !== null && number.high > most;
      return { excess: 0, note: beyond ? `Its ${what}, ${number.text}, meets ${asked}, but the interval reaches beyond.` : null };
    }
    const below = number.low !== null && number.low <= most;
    const reason = `its ${what}, ${number.text}, is above ${asked}` + (below ? ", though the interval reaches it" : "");
    return { reason, excess: scale ? (number.value - most) / scale : Infinity };
  };
  const checksOf = (c) => {
    const checks = [];
    if (w.runtime !== "any" && w.runtime !== c.runtime)
      checks.push({ reason: `it does not run on ${RUNTIMES[w.runtime] ?? w.runtime}`, excess: Infinity });
    if (!c.accuracy) checks.push({ reason: `its ${name} accuracy was not measured`, excess: Infinity });
    const at = batch ? ` at batch ${batch}` : "";
    if (w.latency_ms !== null || w.prefer === "latency")
      checks.push(limit(`latency${at}`, latencyOf(c), w.latency_ms, "ms", Math.abs(w.latency_ms ?? 0)));
    if (w.size_mb !== null || w.prefer === "size") checks.push(limit("size", c.size, w.size_mb, "MB", Math.abs(w.size_mb ?? 0)));
    if (w.loss_points !== null)
      checks.push(limit(`loss against ${VERSUS[w.versus]}`, c.loss[w.versus] ?? null, w.loss_points, "points", Math.max(1, Math.abs(w.loss_points))));
    return checks;
  };
  const rank = (c) => {
    const accuracy = c.accuracy ? -c.accuracy.value : Infinity;
    const latency = latencyOf(c)?.value ?? Infinity;
    const size = c.size?.value ?? Infinity;
    const first = { accuracy: [accuracy, latency, size], latency: [latency, accuracy, size], size: [size, accuracy, latency] };
    return [...first[w.prefer], c.id];
  };
  const compare = (a, b) => {
    const i = a.findIndex((v, k) => v !== b[k]);
    return i < 0 ? 0 : a[i] < b[i] ? -1 : 1;
  };
  const told = (c) => {
    const latency = latencyOf(c);
    const parts = [c.accuracy ? `${name} accuracy ${c.accuracy.text}` : `${name} accuracy not measured`];
    parts.push(latency ? `${latency.text} at batch ${batch}` : "latency not measured");
    parts.push(c.size ? c.size.text : "size not measured");
    const loss = c.loss[w.versus];
    if (loss) parts.push(`loss against ${VERSUS[w.versus]} ${loss.text}${c.paired[w.versus] ? "" : ", not paired"}`);
    return `${c.label}: ${parts.join(", ")}.`;
  };
  const behind = (c, best) => {
    const [worse, equal] = {
      accuracy: [`less accurate (${c.accuracy ? c.accuracy.text : ""})`, "equal, and not faster or smaller"],
      latency: ["slower", "as fast, and not more accurate or smaller"],
      size: ["larger", "as large, and not more accurate or faster"],
    }[w.prefer];
    return `meets all, but is ${rank(c)[0] > rank(best)[0] ? worse : equal}`;
  };
  const rivals = (met) => {
    const best = met[0], mine = latencyOf(best);
    if (w.prefer !== "accuracy" || !mine || !best.accuracy) return [];
    const faster = met.slice(1).filter((c) => {
      const number = latencyOf(c);
      return number && number.value < mine.value && c.accuracy && (c.accuracy.high || c.accuracy.value) >= best.accuracy.value;
    });
    if (!faster.length) return [];
    const c = faster.sort((a, b) => compare([latencyOf(a).value, a.id], [latencyOf(b).value, b.id]))[0];
    return [`${c.label} takes less time, ${latencyOf(c).text}, and its interval of accuracy reaches the same value.`];
  };

  const checks = new Map(files.map((c) => [c, checksOf(c)]));
  const reasons = (c) => checks.get(c).filter((k) => k.reason).map((k) => k.reason);
  const met = files.filter((c) => !reasons(c).length).sort((a, b) => compare(rank(a), rank(b)));
  if (!met.length) {
    const worst = (c) => Math.max(...checks.get(c).map((k) => k.excess));
    const sum = (c) => checks.get(c).reduce((s, k) => s + k.excess, 0);
    const order = [...files].sort((a, b) => compare([worst(a), sum(a), ...rank(a)], [worst(b), sum(b), ...rank(b)]));
    const nearest = order.length && worst(order[0]) < Infinity ? order[0] : null;
    let sentence = "Nothing measured meets this.";
    if (nearest) sentence += ` Nearest comes ${told(nearest).slice(0, -1)}: ${reasons(nearest).join("; ")}.`;
    return { best: null, nearest: nearest ? nearest.id : null, met: [], sentence, notes: [], others: files.map((c) => [c.id, c.label, reasons(c)]) };
  }
  const best = met[0];
  const notes = [...checks.get(best).filter((k) => k.note).map((k) => k.note), ...rivals(met)];
  const others = files.filter((c) => c !== best).map((c) => [c.id, c.label, reasons(c).length ? reasons(c) : [behind(c, best)]]);
  return { best: best.id, nearest: null, met: met.map((c) => c.id), sentence: told(best), notes, others };
}
