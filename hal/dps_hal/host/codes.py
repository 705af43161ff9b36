"""Every stable error code with what to do about it; read by the command line and the tests, never by a board.

The messages at the places that raise say what was expected and what came; the remedy here says what to do.
"""

REMEDIES: dict[str, str] = {
    # tpm
    "tpm.absent": "check that the TPM device or socket named by [tpm] tcti exists and that its service runs",
    "tpm.no_node": "the kernel has the TPM, its device node is not here: hand it in, as the message says",
    "tpm.denied": "give the agent's user access to the TPM, as the message says, and start a new session",
    "tpm.locked_out": "wait for the TPM's own recovery time; do not retry by hand, each failure prolongs it",
    "tpm.lockout_maximum": "let the TPM take more than one failure (TPM2_DictionaryAttackParameters), or have the"
    " service send keys with noDA",
    "tpm.busy": "another program holds the TPM; use /dev/tpmrm0, or stop the other program",
    "tpm.bus_altered": "something between the agent and the TPM alters what passes: check the wiring, look for an"
    " interposer; the agent tries again by itself",
    "tpm.timeout": "the TPM did not answer in time; power-cycle the device if this repeats",
    "tpm.memory": "the TPM has no free object or session slot; use /dev/tpmrm0, or flush what other programs left",
    "tpm.failure_mode": "the TPM reports a failure of its own; power-cycle the device, replace the TPM if it repeats",
    "tpm.disabled": "enable the TPM, its storage (owner) and its endorsement hierarchy in the machine's firmware setup",
    "tpm.failed": "power-cycle the device; if it repeats, report the return code in the message to the TPM's maker",
    "tpm.hierarchy_auth": "let owner_auth_file and endorsement_auth_file in [tpm] name files with the passwords that"
    " the TPM has now; empty the setting where its hierarchy has none",
    "tpm.ek_unsuitable": "the object at ek_handle is no RSA-2048 endorsement key of the TCG template: set another"
    " ek_handle, or have the TPM's owner free it",
    "tpm.ek_template_unsuitable": "none is needed to register; neither value of ek_template gives the key that this"
    " TPM's certificate is for",
    "tpm.srk_unsuitable": "the object at srk_handle is no RSA-2048 storage key of the TCG template, or has a"
    " password: set another srk_handle, or have the TPM's owner free it",
    "tpm.ek_changed": "the record was made for another endorsement key: of another TPM, by another ek_template or"
    " ek_handle, or by a template in the TPM's NV memory that TPM2_Clear has taken; set back what was changed, or enrol"
    " this key and run 'dps-agent reset'",
    "tpm.blob_refused": "the service's answer was not made for this TPM: compare the enrolled endorsement key with"
    " 'dps-agent enroll'",
    "tpm.key_refused": "the TPM does not take the key that the service sent; the message has its return code",
    "tpm.sealed_key": "the TPM was cleared or replaced since 'dps-agent import-key': put the device's key into"
    " device_key_file again, and run that again",
    "tpm.certificate_key": "the TPM was cleared or replaced since 'dps-agent enroll --x509': remove device_key_file,"
    " run that again, and have another certificate issued; of one that DPS issues another key is made by itself",
    "tpm.tls_provider": "install tpm2-openssl 1.2 or newer, as Debian 13 has it, and use a TPM behind the kernel's"
    " resource manager (/dev/tpmrm0); or have the key in a file: 'dps-agent enroll --x509 --key-in-file', or for the"
    ' certificate that DPS issues issued_key = "file"',
    "tpm.key_stale": "the stored key is not of this TPM's storage root key, as after TPM2_Clear; the agent registers"
    " again by itself",
    "tpm.handle_taken": "what is at persist_at is not known as an earlier key of this agent's, and stays: set another"
    " handle, or have the TPM's owner free it",
    "tpm.nv_full": "the TPM has no room for another persistent object: free one with its owner's tools",
    "tpm.certificate_locked": "none is needed to register; have the TPM's owner read NV index 0x01C00002",
    "tpm.nv_unavailable": "the TPM cannot write its memory now; the agent tries again by itself; power-cycle the device"
    " if this repeats",
    "tpm.not_started": "power-cycle the device; if it repeats, enable the TPM in the machine's firmware settings",
    "tpm.upgrading": "finish the upgrade of the TPM's firmware with its maker's tool, then power-cycle the device",
    "tpm.unsupported": "a registration needs a TPM 2.0 with all its commands: switch this one to 2.0 in the machine's"
    " firmware setup, upgrade its firmware, or replace it",
    "tpm.not_available": "install what the message names: in a checkout, pip install '.[tpm]' or '.[simulator]';"
    ' a TPM of this machine is also reached without, by backend = "wire" in [tpm]',
    "tpm.simulator_refused": "a simulated TPM keeps its keys in plain files; use real hardware, or set"
    " i_know_keys_are_in_files = true in [tpm]",
    "tpm.state_damaged": "a file of the simulated TPM is damaged: delete its folder and enrol its new endorsement key",
    # store
    "store.denied": "let the agent's user own the state folder and the files in it; remove what"
    " the message says is no regular file",
    "store.full": "free some space on the state folder's file system",
    "store.io": "the storage failed; check the disk or flash",
    "store.locked": "another dps-agent uses this state folder; stop it, or wait for it",
    "store.read_only": "make the state folder's file system writable",
    "store.too_large": "the assignment does not fit into its slot; send a smaller custom payload from DPS",
    "store.unknown_version": "a newer dps-agent wrote this record: install that version, or run 'dps-agent reset'",
    "store.unsuitable": "name a NOR flash partition of four slots; on NAND put UBIFS over UBI and name a folder there;"
    " on a board make the file system under state_dir a littlefs, or give the agent a block_store",
    # record
    "record.absent": "run 'dps-agent provision'",
    "record.damaged": "run 'dps-agent provision'; the agent registers again by itself",
    "record.stale": "run 'dps-agent provision'; it registers again and keeps the old assignment until then",
    # dps
    "dps.assigned_without_key": "DPS assigned a hub but sent no authenticationKey; check that the enrolment is a TPM"
    " enrolment",
    "dps.assignment_refused": "DPS sent an assignment that this agent must not take; the message says why",
    "dps.allocation_failed": "the enrolment's allocation failed: check its linked hubs and its webhook",
    "dps.bad_request": "DPS did not take the request; compare id_scope, registration_id and payload with the enrolment,"
    ' which has to name a credential policy where certificate = "issued"',
    "dps.blob_malformed": "DPS sent a damaged key; if it repeats, look for a proxy that alters answers",
    "dps.certificate_refused": "compare registration id and certificate with the enrolment ('dps-agent enroll' shows"
    " both): DPS has to have the certificate itself, or a CA above it while certificate_file has all between",
    "dps.chain_unsuitable": "DPS issued certificates that this device has no use for; the agent asks again later; if it"
    " repeats, look at the enrolment's policy",
    "dps.conflict": "DPS refused it beside another change of this registration; the agent tries again by itself",
    "dps.ek_mismatch": "the enrolment holds another endorsement key: enrol the one that 'dps-agent enroll' prints",
    "dps.enrollment_disabled": "enable the enrolment in DPS",
    "dps.forbidden": "check that the enrolment is enabled, and the service's network rules",
    "dps.group_key": "put the key that 'dps-agent enroll --derive' makes of it into device_key_file, and give the group"
    " another one: who has it is every device of the group",
    "dps.key_refused": "look whether there is an enrolment for this registration id, and compare the device's key with"
    " it: a group's devices have each its derived key; a clock that is far off is refused, too",
    "dps.key_unsuitable": "DPS sent a key that is no HMAC-SHA256 signing key, or has a password of its own; report it"
    " to the service",
    "dps.malformed_answer": "the answer is not DPS's; look for a proxy or captive portal between device and service",
    "dps.not_found": "check id_scope, and that an enrolment for this registration id exists",
    "dps.operation_unknown": "DPS lost track of the registration; the agent tries again by itself",
    "dps.redirected": "DPS never redirects; check endpoint, and look for a proxy or captive portal",
    "dps.refused": "DPS refused the registration; the message has its code",
    "dps.still_assigning": "DPS did not finish in time; the agent asks again later",
    "dps.throttled": "DPS takes no more requests now; the agent waits as long as it asks for",
    "dps.token_refused": "DPS did not accept this device's proof: check the device's clock and the enrolled key",
    "dps.unavailable": "DPS, or something before it, could not answer; the agent tries again later",
    "dps.unexpected_status": "DPS answered with a status that the API does not have; check endpoint",
    # network
    "network.closed": "the other end, or something between, ended the connection; the agent tries again by itself; if"
    " it lasts, look for a proxy or firewall that lets nothing to this name through",
    "network.dns": "the endpoint's name did not resolve: check endpoint, DNS and the network cable",
    "network.memory": "a board's heap has no room for a TLS handshake: freeze the modules into the firmware, or hold"
    " less in the program; the agent tries again, and ends for a reset after three times",
    "network.protocol": "what answers there does not speak as DPS or a hub does: check endpoint and connect_to",
    "network.proxy": "put the proxy's URL with the user and the password that it takes into a file of mode 0600"
    " and name it in proxy_file of"
    " [network]; the service gets it by LoadCredential; other settings and the environment may be read by all",
    "network.proxy_scheme": "this agent has Basic only: have the proxy let this device through without credentials, or"
    " put a relay before it that has the scheme which the message names",
    "network.timeout": "no answer in time; check the network and the firewall (outgoing TCP; DPS has port 443)",
    "network.tls": "the server's certificate was not verified: check ca_file, the endpoint's name and the clock",
    "network.not_tls": "look for what answers there instead of the service: check endpoint and connect_to, and whether"
    " a proxy, a captive portal or a firewall stands on the way",
    "network.tls_version": "look for a proxy, firewall or gateway on the way that opens TLS: it has to speak TLS 1.2 or"
    " newer, or to let this device through",
    "network.tls_client_certificate": "where the message says that one is wanted: the agent shows none, and the service"
    " wants none, so look for a gateway on the way that does, and have it let this device through; where it says that"
    " this device's is not taken: compare certificate_file with what the service knows, and the clock with its life",
    "network.tls_failed": "look for a proxy, firewall or gateway on the way that opens TLS, and have it let this device"
    " through; the message says what it did not take",
    "network.too_large": "the answer is larger than any DPS answer; check endpoint",
    "network.unreachable": "no connection to the endpoint; check the network and the firewall (outgoing TCP; DPS"
    " has port 443)",
    # clock
    "hub.lost": "nothing to do unless it lasts: then check the way to the hub, TCP port 8883 (or 443 for WebSocket)",
    "hub.not_found": "check DNS on the device; if the hub was deleted the device registers again by itself",
    "hub.refused": "nothing to do: after two refusals the device registers again; is the device disabled in the hub?",
    "hub.refused_patch": "change the properties as the message says; it is the hub's own",
    "hub.no_twin": "use telemetry instead: a hub of the Basic tier has no twin; where the message is wrong, see [hub]"
    " features",
    "hub.protocol": "report it with the agent's version; something that is no IoT hub may answer at this name",
    "network.not_found": "check that the hub still exists",
    "clock.not_set": "set the device's clock, or let NTP set it",
    # config
    "config.invalid": "correct the setting that the message names",
    "config.missing": "set the setting that the message names",
    "config.no_random_source": "let the board's program call declare_random_source with its hardware's generator",
    "config.unreadable": "make the settings file readable and valid TOML",
    # agent
    "agent.bug": "this is a defect of dps-agent: report it with the output of 'dps-agent version'",
    "agent.busy": "try again in a moment",
    "agent.declined": "run the command again and answer with y, or give --yes",
    "agent.denied": "where the message names a setting, set it and restart the service; else run it as root or as the"
    " service's own user; programs that send telemetry need the group"
    " dps-agent-clients",
    "agent.duplicate": "nothing was written; remove the other line first if that device is to be enrolled anew",
    "agent.file": "do as the message says; a file that is named has to be one that can be read and written",
    "agent.interrupted": "run the command again",
    "agent.no_room": "reset the board, as the example program does where the agent's run ends; where it comes back,"
    " free heap: freeze the modules, or hold less in the program",
    "agent.no_token": "none is needed: the device shows its certificate; to have tokens register it by a symmetric key",
    "agent.not_available": "install what the message names: in a checkout, pip install '.[x509]'; Debian has it as"
    " python3-cryptography",
    "agent.no_tpm": "leave the option out, or set attestation to tpm where this device is to register by its TPM",
    "agent.not_connected": "try again later; 'dps-agent status' says why there is no connection to the hub",
    "agent.not_running": "start the service with 'systemctl start dps-agent' or 'dps-agent run', or look why it does"
    " not answer with 'systemctl status dps-agent'; then run the command again",
    "agent.not_sent": "send it again: the hub does not have it",
    "agent.out_of_time": "run the command again, with a longer --timeout",
    "agent.properties": "change the properties as the message says; the hub would refuse them",
    "agent.spool_full": "send it later, give the spool more room, or let it drop the oldest",
    "agent.too_large": "send less at once; the message says how much fits",
    "agent.unacknowledged": "send it again where twice is better than never: the hub may have it",
    "agent.unknown_event": "nothing to do: it was answered already, took too long, or will be delivered again",
    "agent.usage": "see 'dps-agent --help'; on the socket, GET / lists its requests",
    "agent.waiting": "wait, or run 'dps-agent provision' to try now",
}
