// The server as the page sees it. The key, if it wants one, is kept for this tab only.

export const key = {
  get: () => sessionStorage.getItem("moestro-key") ?? "",
  set: (value) => sessionStorage.setItem("moestro-key", value),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const sent = { "Content-Type": "application/json" };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  return sent;
}

async function checked(answer) {
  if (answer.ok) return answer;
  let message = `The server answered with status ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not JSON: the status has to do
  }
  throw new Refused(answer.status, message);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers(), cache: "no-store" }))).json();
}

/** The events of a streamed answer, one object each. */
export async function* stream(path, body, signal) {
  const sent = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, stream: true }), signal };
  const answer = await checked(await fetch(path, sent));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server ended the answer before it was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
