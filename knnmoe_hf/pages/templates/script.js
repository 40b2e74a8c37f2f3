"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = window.localStorage.getItem("theme");
  } catch {
    // a page from disk may not have any storage
  }
  const show = () => {
    const isDark = chosen === null ? system.matches : chosen === "dark";
    root.dataset.theme = isDark ? "dark" : "light";
    button.textContent = isDark ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      window.localStorage.setItem("theme", chosen);
    } catch {
      // then the choice holds until the page is closed
    }
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
})();
