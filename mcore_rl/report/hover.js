// The values under the pointer, or under the arrow keys when a plot has the focus.
(() => {
  const tip = document.getElementById("tip");

  const show = (svg, x) => {
    const lines = JSON.parse(svg.dataset.lines);
    const nearest = (points) =>
      points.reduce((best, p) => (Math.abs(p[1] - x) < Math.abs(best[1] - x) ? p : best));
    const at = nearest(lines.flatMap((line) => line.points));
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", at[1]);
    cursor.setAttribute("x2", at[1]);
    cursor.removeAttribute("hidden");
    const rows = lines.map((line) => {
      const point = line.points.find((p) => p[0] === at[0]);
      if (!point) return null;
      const row = document.createElement("div");
      const key = document.createElement("i");
      key.className = `key ${line.color}`;
      const value = document.createElement("b");
      value.textContent = point[2];
      row.append(key, `${line.label} `, value);
      return row;
    });
    const head = document.createElement("div");
    head.className = "step";
    head.textContent = typeof at[0] === "number" ? `step ${at[0]}` : /^\d+$/.test(at[0]) ? `from step ${at[0]}` : at[0];
    tip.replaceChildren(head, ...rows.filter(Boolean));
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const left = box.left + at[1] * scale;
    const width = tip.offsetWidth;
    tip.style.left = `${Math.max(8, left + 14 + width > innerWidth - 8 ? left - width - 14 : left + 14)}px`;
    tip.style.top = `${Math.max(8, box.top + 6)}px`;
    svg.dataset.at = at[1];
  };

  const hide = (svg) => {
    tip.hidden = true;
    svg.querySelector(".cursor").setAttribute("hidden", "");
  };

  const move = (svg, direction) => {
    const xs = [...new Set(JSON.parse(svg.dataset.lines).flatMap((line) => line.points.map((p) => p[1])))];
    xs.sort((a, b) => a - b);
    const here = xs.indexOf(Number(svg.dataset.at));
    show(svg, xs[Math.min(xs.length - 1, Math.max(0, here + direction))]);
  };

  for (const svg of document.querySelectorAll("svg[data-lines]")) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      show(svg, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
    });
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide(svg);
      if (!direction) return;
      event.preventDefault();
      move(svg, direction);
    });
  }
})();
