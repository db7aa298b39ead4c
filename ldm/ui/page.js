// Keys, immediate feedback, words under the field that is wrong, and what happens when the server goes away.
() => {
  const find = (selector) => document.querySelector(selector);
  const title = document.title;
  const visible = (element) => element && element.offsetParent !== null && !element.disabled;
  const press = (...selectors) => selectors.map(find).filter(visible).slice(0, 1).forEach((button) => button.click());

  // The status lines: the live region itself stays, its content changes.
  const lines = "#status, #compare-status";
  const listen = () => {
    document.querySelectorAll(lines).forEach((element) => {
      if (element.hasAttribute("aria-live")) return;
      element.setAttribute("role", "status");
      element.setAttribute("aria-live", "polite");
      new MutationObserver(() => follow(element)).observe(element, { childList: true, subtree: true, attributes: true });
    });
  };
  const complain = (line) => {
    document.querySelectorAll(".field-error").forEach((old) => old.remove());
    document.querySelectorAll("[aria-invalid]").forEach((input) => {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    });
    if (line.dataset.state !== "failed" || !line.dataset.field) return;
    const box = document.getElementById(line.dataset.field.replaceAll("_", "-"));
    const input = box && box.querySelector("textarea, input");
    if (!input) return;
    const words = Object.assign(document.createElement("p"), { className: "field-error", id: "field-error" });
    words.textContent = line.textContent;
    box.append(words);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", "field-error");
  };
  const follow = (element) => {
    const line = element.querySelector(".line");
    if (!line) return;
    if (line.dataset.state === "running") {
      document.body.dataset.running = /of [0-9]+/.test(line.firstElementChild.textContent) ? "many" : "one";
      document.title = (line.dataset.progress ? line.dataset.progress + " · " : "") + title;
      return;
    }
    delete document.body.dataset.running;
    document.title = title;
    complain(line);
  };
  const begin = (region) => {
    document.body.dataset.running = "one";
    const line = find(region + " .line");
    if (!line) return;
    line.className = "line running";
    line.dataset.state = "running";
    line.firstElementChild.textContent = "Starting";
  };

  // Stop appears where Generate was: the second half of a double click is not meant for it.
  document.addEventListener("click", (event) => {
    if (event.detail > 1 && event.target.closest("#stop, #compare-stop")) event.stopPropagation();
  }, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#generate")) begin("#status");
    if (event.target.closest("#compare-start")) begin("#compare-status");
    const copy = event.target.closest("[data-copy]");
    if (copy) {
      navigator.clipboard.writeText(copy.dataset.copy).then(() => { copy.textContent = "Copied"; }, () => {});
    }
    if (event.target.closest("#show-keys")) find("#keys").showModal();
    if (event.target.closest("#keys button")) find("#keys").close();
  });
  document.addEventListener("keydown", (event) => {
    const writing = event.target.closest("input, textarea, select, [contenteditable]");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      press("#generate", "#compare-start");
    } else if (event.key === "Enter" && event.altKey) {
      event.preventDefault();
      press("#skip");
    } else if (event.key === "Escape" && !find("#keys").open) {
      press("#stop", "#compare-stop");
    } else if (event.key === "?" && !writing) {
      find("#keys").showModal();
    }
  }, true);

  // While something runs, ask whether the server is there; when it was away, the page goes on by itself.
  const alive = async () => {
    if (!document.body.dataset.running && !document.body.dataset.lost) return;
    const answer = await fetch("alive", { cache: "no-store" }).catch(() => null);
    if (!answer || !answer.ok) {
      document.body.dataset.lost = "yes";
    } else if (document.body.dataset.lost) {
      delete document.body.dataset.lost;
      delete document.body.dataset.running;
      document.title = title;
      ["status", "compare-status"].forEach((id) => {
        const line = find("#" + id + " .line[data-state=running]");
        if (line) line.firstElementChild.textContent = "The server was restarted. Nothing is running; Generate works again.";
      });
    }
  };
  setInterval(alive, 1000);

  const lost = Object.assign(document.createElement("p"), { id: "lost", textContent: "The connection is lost. Reconnecting…" });
  lost.setAttribute("role", "alert");
  document.body.append(lost);
  listen();
  new MutationObserver(listen).observe(document.body, { childList: true, subtree: true }); // a screen is made when it is opened
}
