// API keys for the data and for changing the policy, stored only for the session of this tab.

const keySlots = { data: "ulysses-infer-key", admin: "ulysses-infer-admin-key" };

const keys = {
  get: (slot) => sessionStorage.getItem(keySlots[slot]),
  set: (slot, key) => sessionStorage.setItem(keySlots[slot], key),
  drop(slot) {
    sessionStorage.removeItem(keySlots[slot]);
  },
};

// URLs are relative to the page, so that a proxy may serve it under any path.
async function ask(path, { key, method = "GET", body } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, cache: "no-store", signal: AbortSignal.timeout(8000),
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    if (answer.ok) throw new TypeError("the response is not JSON");
  }
  const error = value && value.error;
  return { status: answer.status, ok: answer.ok, value, error: (error && (error.message || error)) || `HTTP ${answer.status}` };
}

class Admin {
  constructor(store, onKey) {
    Object.assign(this, { store, onKey, available: ["static", "threshold"], touched: false, isSure: false });
    byId("key-form").addEventListener("submit", (event) => this.run(event, () => this.useKey()));
    byId("policy-form").addEventListener("submit", (event) => this.run(event, () => this.apply()));
    byId("policy-form").addEventListener("input", () => {
      this.touched = true;
      this.showFields();
    });
    byId("drain").addEventListener("click", (event) => this.run(event, () => this.drain()));
    byId("forget").addEventListener("click", () => this.forget());
    this.opened = false;
    if (keys.get("admin")) this.run(null, () => this.open(keys.get("admin")));
  }

  async run(event, action) {
    if (event) event.preventDefault();
    const buttons = document.querySelectorAll(".policy button");
    buttons.forEach((button) => { button.disabled = true; });
    try {
      await action();
    } catch {
      this.say("The server does not respond.", "bad");
    } finally {
      buttons.forEach((button) => { button.disabled = false; });
    }
  }

  say(text, tone = "good") {
    byId("admin-message").textContent = text;
    byId("admin-message").dataset.tone = tone;
  }

  // One field for both keys: the key is stored for each kind of access that it grants.
  async useKey() {
    const key = byId("key").value.trim();
    if (!key) return this.say("Enter a key first.", "bad");
    if (/[^\x21-\x7e]/.test(key)) return this.say("A key must not contain spaces or non-ASCII characters.", "bad");
    const opensData = (await ask("dashboard/data?seconds=10", { key })).ok;
    if (opensData) keys.set("data", key);
    const error = await this.open(key);
    byId("key").value = "";
    if (opensData) this.onKey();
    if (error && opensData && this.store.locked) return this.say("This key gives access to the data, but not to the policy.");
    return error ? this.say(error, "bad") : this.say("");
  }

  // Returns the server's error message if it rejects the key, else null.
  async open(key) {
    const answer = await ask("admin/policy", { key });
    if (!answer.ok) {
      keys.drop("admin");
      this.show(false);
      return answer.error;
    }
    keys.set("admin", key);
    const policy = answer.value.policy || answer.value;
    this.available = [...new Set([...(answer.value.available || this.available), policy.name])];
    this.fill(policy);
    this.show(true);
    return null;
  }

  show(opened) {
    this.opened = opened;
    byId("key-form").hidden = opened && !this.store.locked;
    byId("policy-form").hidden = !opened;
  }

  fill(policy) {
    this.touched = false;
    byId("policy-choices").replaceChildren(element("legend", { className: "hidden", textContent: "Policy" }),
      ...this.available.map((name) => element("label", {},
        element("input", { type: "radio", name: "policy", value: name, checked: name === policy.name }),
        element("span", { textContent: name }))));
    const modes = this.store.data ? this.store.data.modes : [];
    byId("policy-mode").replaceChildren(...modes.map(({ sp, tp, name }) =>
      element("option", { value: JSON.stringify([sp, tp]), textContent: name })));
    if (Array.isArray(policy.mode)) byId("policy-mode").value = JSON.stringify(policy.mode);
    if (policy.threshold_tokens !== undefined) byId("policy-threshold").value = policy.threshold_tokens;
    this.showFields();
  }

  // Shows a changed policy or new modes, unless the user is editing the form.
  follow(policy) {
    const seen = JSON.stringify([policy, this.store.data.modes]);
    if (this.opened && !this.touched && seen !== this.seen) this.fill(policy);
    this.seen = seen;
  }

  get chosen() {
    const checked = document.querySelector("input[name=policy]:checked");
    return checked && checked.value;
  }

  showFields() {
    byId("mode-field").hidden = this.chosen !== "static";
    byId("threshold-field").hidden = this.chosen !== "threshold";
  }

  settings() {
    if (this.chosen === "static") return { mode: JSON.parse(byId("policy-mode").value) };
    const threshold = byId("policy-threshold").value;
    return this.chosen === "threshold" && threshold !== "" ? { threshold_tokens: Number(threshold) } : {};
  }

  async apply() {
    const answer = await ask("admin/policy", {
      key: keys.get("admin"), method: "PUT", body: { name: this.chosen, settings: this.settings() },
    });
    if (!answer.ok) return this.say(answer.error, "bad");
    this.touched = false;
    return this.say(`Changed to ${this.chosen}.`);
  }

  async drain() {
    const button = byId("drain");
    if (!this.isSure) {
      this.isSure = true;
      button.textContent = "Really drain?";
      button.classList.add("sure");
      setTimeout(() => this.calm(), 5000);
      return;
    }
    this.calm();
    const answer = await ask("admin/drain", { key: keys.get("admin"), method: "POST" });
    if (answer.ok) this.say("Draining: running requests are completed, new requests are rejected.");
    else this.say(answer.error, "bad");
  }

  calm() {
    this.isSure = false;
    byId("drain").textContent = "Drain…";
    byId("drain").classList.remove("sure");
  }

  forget() {
    keys.drop("admin");
    keys.drop("data");
    this.show(false);
    this.say("Keys removed.");
  }
}
