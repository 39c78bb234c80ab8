// Search, order and colours of the samples.
(() => {
  const tools = document.querySelector(".tools");
  if (!tools) return;
  tools.hidden = false;
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const color = document.getElementById("color");
  const found = document.getElementById("found");
  const lists = [...document.querySelectorAll("[data-ordered]")];
  const items = lists.map((list) => [...list.querySelectorAll(":scope > [data-item]")]);

  const look = () => {
    const words = search.value.trim().toLowerCase();
    let shown = 0;
    lists.forEach((list, i) => {
      const panel = list.closest("details");
      const shared = panel.querySelector("[data-shared]");
      const all = shared && shared.textContent.toLowerCase().includes(words);
      let here = 0;
      for (const item of items[i]) {
        item.hidden = !(all || item.textContent.toLowerCase().includes(words));
        here += !item.hidden;
      }
      panel.hidden = here === 0;
      if (words && here) panel.open = true;
      shown += here;
    });
    found.textContent = words ? `${shown} samples` : "";
  };

  const sort = () => {
    const [, sign, key] = /^(-?)(\w*)$/.exec(order.value);
    const worth = (item) => (item.dataset[key] === "" ? NaN : Number(item.dataset[key]) * (sign ? -1 : 1));
    lists.forEach((list, i) => {
      const sorted = [...items[i]];
      // what has no reward comes last, and equals stay as they were sampled
      if (key) sorted.sort((a, b) => Number.isNaN(worth(a)) - Number.isNaN(worth(b)) || worth(a) - worth(b) || 0);
      list.append(...sorted);
    });
  };

  const paint = () => {
    document.querySelector("main").dataset.color = color.value;
    for (const note of document.querySelectorAll("[data-key]")) note.hidden = note.dataset.key !== color.value;
  };

  search.addEventListener("input", look);
  order.addEventListener("change", sort);
  color.addEventListener("change", paint);
  sort(); // a browser keeps what was chosen when a page is loaded anew
  paint();
  if (search.value) look();
})();
