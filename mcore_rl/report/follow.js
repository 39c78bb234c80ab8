// Loads the page anew where there is something new: between two looks, and not while somebody writes in a field.
(() => {
  const folds = () => [...document.querySelectorAll("details")];
  const name = (fold) => fold.querySelector("summary").firstChild.textContent;
  const open = JSON.parse(sessionStorage.getItem("open") ?? "{}");
  for (const fold of folds()) fold.open = open[name(fold)] ?? fold.open;
  const shown = document.documentElement.dataset.version;
  const busy = () => ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
  const look = async () => {
    try {
      const answer = await fetch("/version", { cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (answer.ok && (await answer.text()) !== shown && !busy()) {
        sessionStorage.setItem("open", JSON.stringify(Object.fromEntries(folds().map((f) => [name(f), f.open]))));
        return location.reload();
      }
    } catch {
      // the server has ended: what is shown stays
    }
    setTimeout(look, 3000);
  };
  setTimeout(look, 3000);
})();
