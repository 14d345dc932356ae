// The form "Which file should I ship?": asks advise() and shows its answer.
{
  const form = document.getElementById("ask");
  if (form) {
    const answer = document.getElementById("answer"), why = document.getElementById("why"), list = why.querySelector("ul");
    const number = (name) => {
      const text = form.elements[name].value;
      return text === "" || isNaN(text) ? null : Number(text);
    };
    const line = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
    const ask = () => {
      const value = (name) => form.elements[name]?.value;
      const wanted = {
        latency_ms: number("latency_ms"), size_mb: number("size_mb"), loss_points: number("loss_points"),
        versus: value("versus"), runtime: value("runtime"), prefer: value("prefer"),
        batch: form.elements.batch ? Number(value("batch")) : null,
      };
      const advice = advise(DATA.points, wanted, DATA.accuracy);
      const head = DATA.points.find((p) => p.id === advice.best)?.label ?? "Nothing measured meets this.";
      const said = line("p", "");
      said.append(line("b", head), advice.sentence.slice(head.length));
      answer.replaceChildren(said);
      answer.append(...advice.notes.map((note) => Object.assign(line("p", note), { className: "small" })));
      list.replaceChildren(...advice.others.map(([, label, reasons]) => line("li", `${label}: ${reasons.join("; ")}.`)));
      why.hidden = !advice.others.length;
    };
    form.addEventListener("input", ask);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    ask();
  }
}
