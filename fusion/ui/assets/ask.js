// The page that asks: what happens is shown as it happens. Whatever is written there is text, never HTML.
"use strict";

const form = document.getElementById("ask");
const byId = (id) => document.getElementById(id);
let asking = null;
let said = ""; // the answer so far
const MOST_CHARS = 20000; // of it are shown while it comes

function element(kind, text, className = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  made.className = className;
  return made;
}

const asDataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

/** Yields the events of a stream as {name, data}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let name = "message";
      let data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        if (line.startsWith("data: ")) data = line.slice(6);
      }
      if (data && data !== "[DONE]") yield { name, data: JSON.parse(data) };
    }
  }
}

function showCall(call, counts) {
  counts[call.stage] = (counts[call.stage] || 0) + 1;
  byId("progress").textContent = Object.entries(counts).map(([stage, number]) => `${number} × ${stage}`).join(", ");
  if (call.candidate === null || call.candidate === undefined) return;
  const id = `live-${call.candidate}`;
  const card = element("article", "", "card");
  card.id = id;
  card.append(element("h3", `${call.member} (candidate ${call.candidate})`));
  const tokens = call.usage.prompt_tokens + call.usage.completion_tokens;
  card.append(element("p", `${call.stage} · ${(call.duration_ms / 1000).toFixed(1)} s · ${tokens} tokens · $${call.cost.toPrecision(2)}`, "soft"));
  if (call.outcome !== "ok") card.append(element("p", `${call.outcome}: ${call.error || ""}`, "problem"));
  const words = element("div", call.text || "", "text");
  words.tabIndex = 0; // it scrolls
  card.append(words);
  const there = byId(id);
  if (!there) byId("live-answers").append(card);
  else if (call.outcome === "ok" || there.querySelector(".problem")) there.replaceWith(card);
}

/** Adds a piece of the answer; it is drawn once a frame, however small the pieces are. */
function say(piece) {
  if (piece && said.length < MOST_CHARS && !say.waiting) {
    say.waiting = requestAnimationFrame(() => {
      say.waiting = 0;
      byId("live-answer").textContent = said.length > MOST_CHARS ? `${said.slice(0, MOST_CHARS)}…` : said;
    });
  }
  said += piece;
}

function fail(message) {
  byId("live-error").textContent = message;
  byId("live-error").hidden = false;
}

async function ask() {
  const fields = new URLSearchParams(new FormData(form));
  for (const file of byId("images").files) fields.append("image", await asDataUrl(file));
  asking = new AbortController();
  byId("live-answers").replaceChildren();
  byId("live-answer").textContent = said = "";
  byId("live-error").hidden = true;
  byId("result").replaceChildren();
  byId("code").hidden = true;
  byId("live").hidden = false;
  byId("send").disabled = true;
  byId("stop").hidden = false;
  byId("continue").hidden = true;
  byId("progress").textContent = "asking";
  const counts = {};
  let trace = null;
  try {
    const response = await fetch(form.dataset.stream, {
      method: "POST", body: fields, signal: asking.signal,
      headers: { "X-CSRF-Token": csrf(), Accept: "application/json" },
    });
    if (!(response.headers.get("content-type") || "").startsWith("text/event-stream")) {
      fail((await response.json()).error);
      return;
    }
    for await (const { name, data } of events(response)) {
      if (name === "call") showCall(data, counts);
      else if (name === "error") fail(data.message);
      else if (name === "code") {
        for (const kind of ["curl", "python", "yaml"]) byId(`code-${kind}`).textContent = data[kind];
        byId("code").hidden = false;
        trace = data.trace;
      } else if (data.error) fail(data.error.message);
      else say(data.choices?.[0]?.delta?.content || "");
    }
    byId("continue").hidden = !said;
    if (trace) {
      const url = `${form.dataset.page}?trace=${encodeURIComponent(trace)}`;
      await load(url, "result");
      if (document.querySelector("#result h2")) {
        byId("live").hidden = true;
        history.replaceState(null, "", url);
      }
    }
    byId("progress").textContent = byId("live-error").hidden ? "answered" : "failed";
  } catch (error) {
    byId("progress").textContent = error.name === "AbortError" ? "stopped" : "";
    if (error.name !== "AbortError") fail("The server does not answer.");
  } finally {
    byId("send").disabled = false;
    byId("stop").hidden = true;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("stop").addEventListener("click", () => asking?.abort());
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

// The question and its answer become earlier turns, which can be edited too.
byId("continue").addEventListener("click", () => {
  for (const [role, words] of [["user", byId("question").value], ["assistant", said]]) {
    const turn = element("fieldset", "", "turn");
    turn.append(element("legend", "Earlier turn"));
    const label = element("label", "Role ");
    const choice = document.createElement("select");
    choice.name = "turn_role";
    for (const name of ["user", "assistant", "system"]) choice.append(new Option(name, name, name === role, name === role));
    label.append(choice);
    const text = document.createElement("textarea");
    text.name = "turn_text";
    text.setAttribute("aria-label", "What was said");
    text.value = words;
    turn.append(label, text);
    byId("turns").append(turn);
  }
  byId("question").value = "";
  byId("question").focus();
  byId("continue").hidden = true;
});
