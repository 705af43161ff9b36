// Follows what happens: on each word of the stream the page is read again, and its live parts take the place of these.
"use strict";

const sign = document.getElementById("live");
let isReading = false;
let isStale = false;

function isBusy(part) {
  const focused = document.activeElement;
  const chosen = document.getSelection();
  const selects = chosen && !chosen.isCollapsed && part.contains(chosen.anchorNode);
  return selects || (part.contains(focused) && focused.matches("input, textarea, button"));
}

async function lookAgain() {
  if (isReading) {
    isStale = true;
    return;
  }
  isReading = true;
  try {
    const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" } });
    if (answer.ok) {
      const seen = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of document.querySelectorAll("[data-live]")) {
        const newer = seen.getElementById(part.id);
        if (!newer || isBusy(part) || newer.innerHTML === part.dataset.seen) {
          continue;
        }
        const focused = document.activeElement;
        const at = part.contains(focused) ? focused.closest("[id]") : null;
        const opened = [...part.querySelectorAll("details[open]")].map((each) => each.id);
        part.dataset.seen = newer.innerHTML;
        part.replaceChildren(...newer.childNodes);
        for (const id of opened) {
          document.getElementById(id)?.setAttribute("open", "");
        }
        if (at && at.id !== part.id) {
          document.getElementById(at.id)?.querySelector("summary, a")?.focus();
        }
      }
    }
  } catch {
    // The stream says when there is somebody to ask again.
  } finally {
    isReading = false;
    if (isStale) {
      isStale = false;
      lookAgain();
    }
  }
}

const stream = new EventSource("/events");
stream.addEventListener("open", () => (sign.textContent = "● live"));
stream.addEventListener("error", () => (sign.textContent = "○ no emulator answers"));
stream.addEventListener("changed", lookAgain);

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  });
}

const list = document.querySelector("#import");
if (list) {
  list.addEventListener("dragover", (event) => {
    event.preventDefault();
    list.classList.add("over");
  });
  list.addEventListener("dragleave", () => list.classList.remove("over"));
  list.addEventListener("drop", async (event) => {
    event.preventDefault();
    list.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) {
      list.querySelector("textarea").value = await file.text();
    }
  });
}

// What was said belongs to what was just done: a reload does not say it again.
const asked = new URLSearchParams(location.search);
if (asked.has("said") || asked.has("refused")) {
  history.replaceState(null, "", location.pathname);
}
