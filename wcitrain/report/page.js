"use strict";
// The page is complete without this script, which adds: a theme button, a legend that hides lines, values under the pointer.
(() => {
  const every = (selector, root = document) => [...root.querySelectorAll(selector)];

  const button = document.querySelector(".theme"), dark = document.getElementById("dark");
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  let theme = "";
  try { theme = localStorage.getItem("wcitrain-theme") || ""; } catch { /* storage is refused on some file:// pages */ }
  const paint = () => {
    const isDark = theme ? theme === "dark" : prefers.matches;
    dark.media = isDark ? "screen" : "not all";
    button.textContent = isDark ? "Light theme" : "Dark theme";
    return isDark;
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = paint() ? "light" : "dark";
    try { localStorage.setItem("wcitrain-theme", theme); } catch { /* the choice then lasts as long as the page */ }
    paint();
  });
  prefers.addEventListener("change", paint);
  paint();

  const hidden = new Set();
  const show = () => {
    every(".series").forEach(series => series.classList.toggle("off", hidden.has(series.dataset.entry)));
    every(".legend [data-entry]").forEach(item => item.setAttribute("aria-pressed", !hidden.has(item.dataset.entry)));
  };
  const light = entry => {
    document.body.classList.toggle("dim", entry !== null);
    every(".series").forEach(series => series.classList.toggle("lit", series.dataset.entry === entry));
  };
  every(".legend [data-entry]").forEach(item => {
    const entry = item.dataset.entry;
    item.addEventListener("click", () => { hidden.delete(entry) || hidden.add(entry); show(); });
    item.addEventListener("pointerenter", event => event.pointerType === "mouse" && !hidden.has(entry) && light(entry));
    item.addEventListener("pointerleave", () => light(null));
  });
  every(".legend [data-all]").forEach(item => {
    item.hidden = false;
    item.addEventListener("click", () => {
      hidden.clear();
      if (item.dataset.all === "none") every(".legend [data-entry]").forEach(other => hidden.add(other.dataset.entry));
      show();
    });
  });

  every(".chart > svg").forEach(svg => {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    svg.parentNode.append(tip);
    svg.addEventListener("pointermove", event => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null, nearest = 24 ** 2;  // SVG units around the pointer
      for (const series of every(".series:not(.off)", svg)) {
        const points = series.querySelector("polyline").points;
        for (let i = 0; i < points.length; i++) {
          const distance = (points[i].x - at.x) ** 2 + (points[i].y - at.y) ** 2;
          if (distance < nearest) { nearest = distance; best = [series, i, points[i]]; }
        }
      }
      tip.hidden = !best;
      if (!best) return;
      const [series, i, point] = best, data = series.dataset;
      tip.textContent = `${data.name}: ${data.y.split("|")[i]} (${data.x.split("|")[i]})`;
      const place = new DOMPoint(point.x, point.y).matrixTransform(svg.getScreenCTM()), box = svg.parentNode.getBoundingClientRect();
      const half = tip.offsetWidth / 2;
      tip.style.left = `${Math.min(Math.max(place.x - box.left, half), Math.max(half, box.width - half))}px`;
      tip.style.top = `${place.y - box.top}px`;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  });

  window.addEventListener("beforeprint", () => every("details").forEach(details => { details.open = true; }));
})();
