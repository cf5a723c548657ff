// A host of MCP Apps: the AppBridge of the ext-apps package, before our server over HTTP. The test bundles it.
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { AppBridge, PostMessageTransport } from "@modelcontextprotocol/ext-apps/app-bridge";

// What the specification has a host allow where a resource names no domains.
const POLICY = "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; media-src 'self' data:; connect-src 'none'";
const APPS = { "io.modelcontextprotocol/ui": { mimeTypes: ["text/html;profile=mcp-app"] } };

async function connected(extensions) {
  const client = new Client({ name: "host", version: "1" }, { capabilities: { extensions } });
  await client.connect(new StreamableHTTPClientTransport(new URL("/mcp", location.href)));
  return client;
}

window.seen = { calls: [], sizes: [] };
const { fetch } = window;
window.fetch = (address, options) => {
  const sent = options?.body ? JSON.parse(options.body) : {};
  if (sent.method === "tools/call") seen.calls.push(sent.params.name);
  return fetch(address, options);
};

/** Calls a tool, and shows its page as a chat does; what the page did is in `window.seen`. */
window.show = async (tool, args, theme) => {
  const client = await connected(APPS);
  const { tools } = await client.listTools();
  const { resourceUri } = tools.find((one) => one.name === tool)._meta.ui;
  const { contents } = await client.readResource({ uri: resourceUri });
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.style.cssText = "width: 100%; height: 300px; border: 0";
  seen.mimeType = contents[0].mimeType;
  const bridge = new AppBridge(client, { name: "host", version: "1" }, { serverTools: {} }, { hostContext: { theme } });
  bridge.oninitialized = async () => {
    bridge.sendToolInput({ arguments: args });
    bridge.sendToolResult(await client.callTool({ name: tool, arguments: args }));
  };
  bridge.onsizechange = ({ height }) => {
    seen.sizes.push(height);
    frame.style.height = `${height}px`;
  };
  const transport = new Promise((resolve) => {
    frame.addEventListener("load", () => resolve(), { once: true });
  });
  const page = contents[0].text.replace("<head>", `<head><meta http-equiv="Content-Security-Policy" content="${POLICY}">`);
  document.body.append(frame);
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  frame.srcdoc = page;
  await transport;
  window.bridge = bridge;
};

/** The names of tools and resources that a client without MCP Apps is shown. */
window.plainLists = async () => {
  const client = await connected({});
  const { tools } = await client.listTools();
  const { resources } = await client.listResources();
  return { tools: tools.map((one) => one.name), withPage: tools.filter((one) => one._meta?.ui).length, resources: resources.map((one) => one.uri) };
};
