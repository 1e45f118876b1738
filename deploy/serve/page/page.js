// The page at `/`: contexts and their shards, what is running, a question and its answer as it comes.
// Talks only to the endpoint that served it; text from there enters the page as text, never as markup.

const POLL_MS = 1000;
const IN_VAIN_MS = 5000; // between two polls while the endpoint does not answer
const SHOWN_RUNNING = 12;

const at = (id) => document.getElementById(id);
const state = { contexts: [], chosen: "", model: "", asking: null };

function headers(more = {}) {
  const key = sessionStorage.getItem("ringspan-key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function get(path) {
  const reply = await fetch(path, { headers: headers() });
  if (!reply.ok) throw new Error(await messageOf(reply));
  return reply.json();
}

async function messageOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the endpoint answered ${reply.status} ${reply.statusText}`;
  }
}

function element(name, text = "", attributes = {}) {
  const made = name === "path" || name === "text"
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function trouble(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

const count = (n) => n.toLocaleString("en");

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; n >= 1000 && unit < units.length - 1; unit += 1) n /= 1000;
  return `${unit ? n.toPrecision(3) : n} ${units[unit]}`;
}

function seconds(s) {
  if (s < 90) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

// contexts

function showContexts() {
  const list = at("contexts");
  at("no-contexts").hidden = state.contexts.length > 0;
  list.replaceChildren(...state.contexts.map((context) => {
    const chosen = context.id === state.chosen;
    const item = element("li", "", {
      role: "option", id: `context-${context.id}`, "aria-selected": String(chosen), "data-id": context.id,
    });
    const where = context.on_gang ? "on the gang" : "in the store";
    item.append(
      element("span", context.id.slice(0, 12), { class: "id" }),
      element("small", `${count(context.num_tokens)} tokens, ${context.codec}, ${context.fidelity}, ${where}`),
    );
    return item;
  }));
  const chosen = state.contexts.find((context) => context.id === state.chosen);
  list.setAttribute("aria-activedescendant", chosen ? `context-${chosen.id}` : "");
  at("asked-of").textContent = chosen ? `on context ${chosen.id.slice(0, 12)}` : "(without a context)";
  showRing(chosen);
}

function choose(id) {
  state.chosen = id === state.chosen ? "" : id;
  showContexts();
}

at("contexts").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) choose(item.dataset.id);
});

at("contexts").addEventListener("keydown", (event) => {
  const ids = state.contexts.map((context) => context.id);
  const now = ids.indexOf(state.chosen);
  const next = {
    ArrowDown: Math.min(now + 1, ids.length - 1), ArrowUp: Math.max(now - 1, 0),
    Home: 0, End: ids.length - 1, Escape: -1,
  }[event.key];
  if (next === undefined || !ids.length) return;
  event.preventDefault();
  state.chosen = next < 0 ? "" : ids[next];
  showContexts();
});

// the ring: an arc a shard, as long as its share of the pages

function arc(from, to, inner, outer) {
  const point = (turn, radius) => {
    const angle = 2 * Math.PI * (turn - 0.25);
    return `${130 + radius * Math.cos(angle)} ${130 + radius * Math.sin(angle)}`;
  };
  const large = to - from > 0.5 ? 1 : 0;
  return `M ${point(from, outer)} A ${outer} ${outer} 0 ${large} 1 ${point(to, outer)} ` +
    `L ${point(to, inner)} A ${inner} ${inner} 0 ${large} 0 ${point(from, inner)} Z`;
}

function showRing(context) {
  const shards = context?.shards ?? [];
  const all = shards.reduce((sum, shard) => sum + shard.pages, 0);
  const drawn = [];
  let begin = 0;
  for (const shard of shards) {
    const share = all ? shard.pages / all : 0;
    const end = begin + Math.min(share, 0.99999); // a whole circle has no direction
    if (share) {
      const path = element("path", "", { d: arc(begin, end, 78, 120), class: shard.tier });
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = `rank ${shard.rank}: ${count(shard.pages)} pages, ${shard.codec}, ${shard.tier}`;
      path.append(title);
      const middle = 2 * Math.PI * ((begin + end) / 2 - 0.25);
      const label = element("text", String(shard.rank), {
        class: "on", x: 130 + 99 * Math.cos(middle), y: 130 + 99 * Math.sin(middle),
      });
      drawn.push(path, ...(share > 0.02 ? [label] : []));
    }
    begin += share;
  }
  if (context) {
    drawn.push(
      element("text", count(context.num_tokens), { class: "large", x: 130, y: 122 }),
      element("text", `tokens in ${context.codec}`, { x: 130, y: 144 }),
    );
  }
  at("ring").replaceChildren(...drawn);
  at("ring-caption").textContent = context
    ? `${count(all)} pages on ${shards.length} ${shards.length === 1 ? "rank" : "ranks"}, ${bytes(context.kv_bytes)}`
    : "Choose a context to see its shards.";
  at("shards").hidden = !shards.length;
  at("shards").tBodies[0].replaceChildren(...shards.map((shard) => {
    const row = element("tr");
    row.append(
      element("td", String(shard.rank)),
      element("td", [shard.host, shard.device].filter(Boolean).join(" ")),
      element("td", shard.tier),
      element("td", shard.codec),
      element("td", count(shard.pages), { class: "number" }),
      element("td", bytes(shard.bytes), { class: "number" }),
    );
    return row;
  }));
}

// what is running

function showRunning(requests) {
  const over = new Set(["done", "failed", "cancelled"]);
  const running = requests.filter((request) => !over.has(request.state)).slice(0, SHOWN_RUNNING);
  at("none-running").hidden = running.length > 0;
  at("running").replaceChildren(...running.map((request) => {
    const item = element("li");
    const name = request.kind === "context" ? "prefill" : "answer";
    const left = request.left_s > 0 ? `, about ${seconds(request.left_s)} left` : "";
    const done = request.state === "answering"
      ? `${count(request.completion_tokens)} tokens said`
      : `${count(request.tokens_done)} of ${count(request.prompt_tokens)} tokens`;
    const place = request.state === "waiting" && request.queue_place ? `, ${request.queue_place} in the queue` : "";
    const label = `${name} ${(request.context_id || request.request_id).slice(0, 12)}: ${request.state}${place}, ${done}${left}`;
    item.append(element("span", label));
    if (request.state !== "answering") {
      item.append(element("progress", "", {
        max: Math.max(1, request.prompt_tokens), value: request.tokens_done, "aria-label": label,
      }));
    }
    return item;
  }));
}

// a question

async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    kept += value;
    const parts = kept.split("\n\n");
    kept = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function ask() {
  const question = at("question").value.trim();
  if (!question || state.asking) return;
  state.asking = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("answer").textContent = "";
  at("pace").textContent = "waiting";
  trouble("");
  const began = performance.now();
  let first = 0;
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      signal: state.asking.signal,
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({
        model: state.model,
        messages: [{ role: "user", content: question }],
        max_completion_tokens: Number(at("most").value) || 128,
        temperature: 0,
        stream: true,
        stream_options: { include_usage: true },
        ...(state.chosen ? { contexts: [state.chosen] } : {}),
      }),
    });
    if (!reply.ok) throw new Error(await messageOf(reply));
    for await (const event of eventsOf(reply)) {
      if (event.error) throw new Error(event.error.message);
      const now = performance.now();
      const said = event.choices?.[0]?.delta?.content;
      if (said) {
        first ||= now;
        at("answer").append(said);
      }
      if (event.prompt_progress) {
        const { processed, total } = event.prompt_progress;
        at("pace").textContent = `prefilling: ${count(processed)} of ${count(total)} tokens`;
      }
      if (event.usage) {
        const { prompt_tokens, completion_tokens, prompt_tokens_details } = event.usage;
        const pace = completion_tokens > 1 && first ? `, then ${((completion_tokens - 1) * 1000 / (now - first)).toFixed(1)} tokens/s` : "";
        at("pace").textContent = `${count(prompt_tokens)} prompt tokens, ${count(prompt_tokens_details?.cached_tokens ?? 0)} of them cached; ` +
          `first token after ${seconds(((first || now) - began) / 1000)}${pace}`;
      }
    }
  } catch (error) {
    at("pace").textContent = error.name === "AbortError" ? "stopped" : "";
    if (error.name !== "AbortError") trouble(error.message);
  } finally {
    state.asking = null;
    at("send").disabled = false;
    at("stop").disabled = true;
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  }
});
at("stop").addEventListener("click", () => state.asking?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.asking?.abort();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("ringspan-key", at("key").value);
  at("key").value = "";
  at("key").placeholder = "in use";
  poll();
});

// keeping it true

let polling = 0;

async function poll() {
  clearTimeout(polling);
  let wait = POLL_MS;
  try {
    const [models, contexts, requests] = await Promise.all([get("/v1/models"), get("/v1/contexts"), get("/v1/requests")]);
    const model = models.data[0];
    state.model = model.id;
    at("model").textContent = `${model.id}, up to ${count(model.max_model_len)} tokens`;
    const before = JSON.stringify(state.contexts);
    state.contexts = contexts.data;
    if (!state.contexts.some((context) => context.id === state.chosen)) state.chosen = "";
    if (before !== JSON.stringify(state.contexts)) showContexts();
    showRunning(requests.data);
    if (!state.asking && at("trouble").dataset.of === "poll") trouble("");
    at("trouble").dataset.of = "";
  } catch (error) {
    trouble(error.message === "Failed to fetch" ? "The endpoint does not answer; trying again." : error.message);
    at("trouble").dataset.of = "poll";
    wait = IN_VAIN_MS;
  }
  polling = setTimeout(poll, document.hidden ? 10 * wait : wait);
}

showContexts();
poll();
