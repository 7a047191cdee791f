// The page at /: a prompt is streamed on, and each piece of text shows the probabilities of its tokens.
"use strict";

const at = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
  "presence_penalty", "seed"];
let model = null;
let running = null; // what breaks the stream off

function asked() {
  const body = { model, prompt: at("prompt").value, stream: true, logprobs: 5 };
  for (const name of NUMBERS) if (at(name).value !== "") body[name] = Number(at(name).value);
  if (at("stop").value !== "") body.stop = at("stop").value;
  return body;
}

// Yield the JSON of each event of a stream.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function percent(logProb) {
  const share = 100 * Math.exp(logProb);
  return `${share >= 0.01 ? share.toFixed(2) : share.toExponential(1)}%`;
}

// Return a token as it is shown: in quotes, for spaces and line ends; parts of characters are told as bytes.
function quoted(token) {
  return token.startsWith("bytes:") ? token : JSON.stringify(token);
}

// Return lines that name the tokens of a piece of text, and the likeliest in the place of each.
function lines(tokens) {
  return tokens.map(({ token, logProb, likeliest }) => [
    `${quoted(token)}  ${percent(logProb)}`,
    ...Object.entries(likeliest).sort((a, b) => b[1] - a[1]).slice(0, 5)
      .map(([other, value]) => `  ${percent(value).padStart(8)}  ${quoted(other)}`),
  ].join("\n")).join("\n");
}

function show(text, tokens) {
  const piece = document.createElement("span");
  piece.className = "token";
  piece.textContent = text;
  const sum = tokens.reduce((total, each) => total + each.logProb, 0);
  piece.style.background = `hsl(25 95% 55% / ${(0.5 * (1 - Math.exp(sum / tokens.length))).toFixed(3)})`;
  piece.dataset.hint = lines(tokens);
  at("text").append(piece);
}

function size(bytes) {
  if (!bytes) return "–";
  return bytes < 1024 * 1024 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / 1024 / 1024).toFixed(2)} MiB`;
}

async function refresh() {
  const told = await (await fetch("status")).json();
  model = told.model;
  at("model").textContent = told.model;
  at("state").textContent = size(told.state_bytes_per_row);
  at("load").textContent = `${told.running}, ${told.waiting}`;
  at("prefixes").textContent = `${told.prefixes.hits} of ${told.prefixes.hits + told.prefixes.misses}`;
}

async function run() {
  running = new AbortController();
  at("go").disabled = true;
  at("halt").disabled = false;
  at("error").textContent = "";
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = at("prompt").value;
  at("text").replaceChildren(prompt);
  let count = 0;
  let first = null;
  let waiting = []; // tokens whose text has not come yet: parts of a character, or of a stop string
  try {
    const headers = { "content-type": "application/json" };
    const response = await fetch("v1/completions",
      { method: "POST", headers, body: JSON.stringify(asked()), signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      const { tokens, token_logprobs: own, top_logprobs: top } = choice.logprobs;
      tokens.forEach((token, place) => waiting.push({ token, logProb: own[place], likeliest: top[place] }));
      count += tokens.length;
      first ??= performance.now();
      const seconds = (performance.now() - first) / 1000;
      at("count").textContent = count;
      if (count > 1 && seconds > 0) at("rate").textContent = ((count - 1) / seconds).toFixed(1);
      if (choice.text !== "") {
        show(choice.text, waiting);
        waiting = [];
      }
      if (count === 1) refresh();
    }
  } catch (error) {
    if (error.name !== "AbortError") at("error").textContent = error.message;
  } finally {
    running = null;
    at("go").disabled = false;
    at("halt").disabled = true;
    refresh();
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) run();
});
at("halt").addEventListener("click", () => running?.abort());
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("text").addEventListener("mousemove", (event) => {
  const hint = at("hint");
  const told = event.target.dataset.hint;
  hint.style.display = told ? "block" : "none";
  if (!told) return;
  hint.textContent = told;
  hint.style.left = `${Math.min(event.clientX + 14, innerWidth - hint.offsetWidth - 8)}px`;
  hint.style.top = `${Math.min(event.clientY + 18, innerHeight - hint.offsetHeight - 8)}px`;
});
at("text").addEventListener("mouseleave", () => { at("hint").style.display = "none"; });
refresh().catch((error) => { at("error").textContent = error.message; });
