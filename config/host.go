// Package config reads what a host is told: its own configuration and the
// roster of the fleet.
//
// [Load] reads the configuration of this host, TOML with CONSEAL_ variables of
// the environment over it; the comments of [Host] are its manual. [LoadRoster]
// reads the roster. Both are strict: a name that is not known, a value of the
// wrong kind or a file that others could change is refused, and the error,
// [Problems], lists everything that is wrong and not only the first thing.
package config

import (
	"os"
	"reflect"
	"time"
)

// Host is the configuration of one host. Every key may be overridden by the
// environment: CONSEAL_, then the key in upper case with "_" for ".", as in
// CONSEAL_LOG_LEVEL or CONSEAL_PROTECTOR_TPM_PCRS=0,7. A variable that is set
// counts even if it is empty; lists are separated by commas.
//
// Paths are absolute.
type Host struct {
	// Name is this host's name in the roster. No default. Example: "alpha".
	Name string `toml:"name"`
	// State is the folder of the shares and of all else that must survive a
	// restart. If it exists, its mode must be 0700. Default: "/var/lib/conseal".
	State string `toml:"state"`
	// Roster is the file of the roster. Default: "/etc/conseal/roster.toml".
	Roster string `toml:"roster"`
	// InsecureLab accepts a roster that nobody signed: whoever can write the
	// file then decides who may sign with every key. For laboratories only.
	// Default: false.
	InsecureLab bool `toml:"insecure_lab"`

	Listen    Listen    `toml:"listen"`
	Protector Protector `toml:"protector"`
	Limits    Limits    `toml:"limits"`
	Log       Log       `toml:"log"`

	origins map[string]string // of each key's value, for Print; nil if not loaded
}

// Listen says where the agent can be reached.
type Listen struct {
	// Address is host:port for the agents of other hosts, which it lets in by
	// mutual TLS only. Default: "0.0.0.0:7443".
	Address string `toml:"address"`
	// SignSocket is the unix socket for the services of this host, mode 0660;
	// which of them may use which key is in the roster.
	// At most 107 bytes. Default: "/run/conseal/sign.sock".
	SignSocket string `toml:"sign_socket"`
	// SignSocketGroup is the name of the group that owns SignSocket; empty is
	// the agent's own group. Default: "". Example: "signers".
	SignSocketGroup string `toml:"sign_socket_group"`
	// AdminSocket is the unix socket for the people who run this host, mode
	// 0600. At most 107 bytes. Default: "/run/conseal/admin.sock".
	AdminSocket string `toml:"admin_socket"`
}

// Protector is the hardware that guards this host's shares at rest.
type Protector struct {
	// Kind is "tpm" or "hsm", as the roster says of this host. Default: "tpm".
	Kind string `toml:"kind"`

	TPM TPM `toml:"tpm"`
	HSM HSM `toml:"hsm"`
}

// TPM is used if the protector's kind is "tpm".
type TPM struct {
	// Device is "device:PATH", "unix:PATH" or "tcp:HOST:PORT".
	// Default: "device:/dev/tpmrm0".
	Device string `toml:"device"`
	// PCRs are the registers of the SHA-256 bank in whose present state, and in
	// no other, the host's shares open again. Never empty; 16 and 23 are refused,
	// since any process may reset them. Default: [0, 2, 4, 7], the firmware, its
	// extensions, the boot loader and the Secure Boot policy.
	PCRs []int `toml:"pcrs"`
	// NVRoot is the NV index of the erasable root, one of the owner's: 0x01800000
	// to 0x01bfffff. Two agents on one TPM need two. Default: 0x01800600.
	NVRoot uint32 `toml:"nv_root"`
	// PolicyKey is a file with the public key (P-256; PEM, or ssh-keygen's .pub) by
	// which a security team signs seal policies: they then say in which states the
	// host's shares open, and PCRs only what is measured for them. It cannot be changed
	// once the host was initialised. Default: none; shares open in the state in which
	// the host was initialised, and in no other.
	PolicyKey string `toml:"policy_key"`
	// NVCounter is the NV index of the counter that revokes seal policies, as NVRoot.
	// Default: 0x01800601.
	NVCounter uint32 `toml:"nv_counter"`
	// NVReceipts is the NV index of the counter by which the TPM certifies what the
	// host did and in which order, as NVRoot. If it is changed, run conseald init
	// again. Default: 0x01800602.
	NVReceipts uint32 `toml:"nv_receipts"`
	// PIN says where the host's PIN is, of 6 to 32 bytes, and never what it is, in the
	// forms of an HSM's. The host's shares then open with it only, or by a signed seal
	// policy that does not want it. A wrong one is sent once, and counts as a dictionary
	// attack on the TPM. It cannot be changed once the host was initialised.
	// Default: none.
	PIN string `toml:"pin" hidden:"true"`
	// EventLog is where the kernel gives out what the firmware has measured, which a
	// measurement for the security team takes along. Empty means none; that the file is
	// missing is no error. The default is not looked at unless Device is "device:PATH",
	// since another TPM has other PCRs.
	// Default: "/sys/kernel/security/tpm0/binary_bios_measurements".
	EventLog string `toml:"event_log"`
	// SRKHandle is the persistent handle of the storage root key, 0x81000000 to
	// 0x817fffff. A key of another kind that is there already is never evicted:
	// choose another handle. Default: 0x81000001.
	SRKHandle uint32 `toml:"srk_handle"`
	// Timeout is how long one command may take before the TPM is taken to be
	// stuck, and for how long one is tried again that a busy TPM did not start,
	// 1s to 10m. Default: "30s".
	Timeout time.Duration `toml:"timeout"`
}

// HSM is used if the protector's kind is "hsm".
type HSM struct {
	// URI selects the token by its label or serial, and one of Modules by
	// module-path (RFC 7512). It may have pin-source instead of PIN; pin-value is
	// refused. No default. Example:
	// "pkcs11:token=conseal?module-path=/usr/lib/softhsm/libsofthsm2.so".
	URI string `toml:"uri" hidden:"true"`
	// PIN says where the PIN is, and never what it is: "file:/PATH" of a file
	// of mode 0600, "fd:N" of a descriptor that the agent inherits, 3 or above, or
	// "cred:NAME" of a systemd credential. No default.
	PIN string `toml:"pin" hidden:"true"`
	// SecondURI selects a second token, as URI does, which is used while the first is away.
	// Its identity and wrapping key are copies of the first's, made by the vendor's means
	// before `conseald init`. New keys, and all that takes a new root, need both tokens.
	// Tokens that copy their keys to each other by themselves are one token, the vendor's
	// own: do not name them here. See docs/hsm.md. Default: "", none.
	SecondURI string `toml:"second_uri" hidden:"true"`
	// SecondPIN says where the second token's PIN is, as PIN does. Default: PIN's.
	SecondPIN string `toml:"second_pin" hidden:"true"`
	// Modules are the PKCS#11 libraries that may be loaded: code that sees the PIN
	// and every key that the token gives back, in a process of its own. Never empty.
	// No default. Example: ["/usr/lib/softhsm/libsofthsm2.so"].
	Modules []string `toml:"modules"`
	// Method is how the token guards a key: "aes-gcm", "aes-kw-enc", "aes-kw", "aes-kwp",
	// "rsa-oaep-sha256", "hmac-sha256-prf" or "rsa-oaep-sha1". `conseald hsm probe` says which
	// this token can and which to set. No file of the host chooses it. It cannot be changed
	// once the host was initialised. Default: "aes-gcm".
	Method string `toml:"method"`
	// Erasure says how final it is that the token destroys a key: "device", it was in one
	// device only; "host-file", the token is a file, of which there may be copies; or
	// "replicated", a service keeps copies. `conseald init` guesses and cannot see backups
	// and clones: who knows better says so here. With two tokens, the least of the two.
	// It changes nothing but what `conseal status` says. Default: "", the guess.
	Erasure string `toml:"erasure"`
	// InitArgs is a text for C_Initialize, for the libraries that want one there, as
	// NSS softoken does. Default: "", none.
	InitArgs string `toml:"init_args"`
	// MaxSessions is how many sessions are open on the token at most, 1 to
	// 1024. Default: 8.
	MaxSessions int `toml:"max_sessions"`
	// Timeout is how long the module may take for one use of a key before it is
	// taken to hang, and its process is ended and started anew: 1s to 10m. Opening the
	// token, and reading or setting the root, may take three times as long. A module that
	// is ended inside its login needs `conseald clear-pin-latch`, so that slow tokens want
	// more. Default: "10s".
	Timeout time.Duration `toml:"timeout"`
	// Environment are the variables that the module gets to see, as its vendor's manual
	// names them; it sees no others but CREDENTIALS_DIRECTORY. Default: the variables by
	// which SoftHSM, Luna, nShield, Utimaco, YubiHSM, tpm2-pkcs11 and Cloud KMS find their
	// configuration: ["SOFTHSM2_CONF", "ChrystokiConfigurationPath", "NFAST_HOME",
	// "CS_PKCS11_R3_CFG", "YUBIHSM_PKCS11_CONF", "TPM2_PKCS11_STORE", "KMS_PKCS11_CONFIG"].
	Environment []string `toml:"environment"`
	// Objects are keys that somebody else made in the token.
	Objects Objects `toml:"objects"`
}

// Objects names keys of the token that `conseald init` uses, after it has checked them, and
// does not make: those of a ceremony, or of a token that makes keys by its vendor's tool
// only. Root keys are made by the host in any case. See docs/hsm.md. They cannot be changed
// once the host was initialised.
type Objects struct {
	// Identity is a key pair on P-256 that signs: its label, or its id as "id=%01%AB".
	// Default: "", the host makes it.
	Identity string `toml:"identity"`
	// Wrap is a key of the kind that Method needs, named in the same way. Default: "",
	// the host makes it.
	Wrap string `toml:"wrap"`
}

// Limits bound what one caller or one other host can make this host do.
type Limits struct {
	// Message is the length in bytes of the longest message to sign, at most
	// 4194304. Default: 1048576.
	Message int `toml:"message"`
	// SignDeadline is how long one signature may take, 100ms to 10m.
	// Default: "30s".
	SignDeadline time.Duration `toml:"sign_deadline"`
	// KeygenDeadline is how long making a key may take before it starts anew,
	// 1s to 24h. Default: "2m".
	KeygenDeadline time.Duration `toml:"keygen_deadline"`
	// SessionsPerPeer is how many sessions one other host may have open here at
	// once, 1 to 65536. Default: 64.
	SessionsPerPeer int `toml:"sessions_per_peer"`
	// PeerRate is how many messages a second are taken from one other host, 1
	// to 1000000. Default: 5000.
	PeerRate int `toml:"peer_rate"`
	// EpochsPerPeer is how many new epochs one other host may lead here that this host's
	// roster does not call for, as `conseal key refresh` there does, 1 to 65536. One more
	// comes with each hour. Default: 1000.
	EpochsPerPeer int `toml:"epochs_per_peer"`
	// ErasuresPerHour is how often an hour this host erases shares that new epochs
	// replaced, after the first 100 times, 1 to 65536: each time takes a root of its
	// hardware, and what became old meanwhile goes together. Default: 2.
	ErasuresPerHour int `toml:"erasures_per_hour"`
	// CallerRate is how many requests a second are taken from one local user, 1
	// to 1000000. Default: 1000.
	CallerRate int `toml:"caller_rate"`
	// Presignatures is how many ECDSA signatures are prepared while the machine
	// is idle, for each key and each quorum that this host may ask, 0 to 64.
	// Default: 4.
	Presignatures int `toml:"presignatures"`
}

// Log says what the agent writes to standard error. No level shows secrets.
type Log struct {
	// Level is "debug", "info", "warn" or "error". Default: "info".
	Level string `toml:"level"`
	// Format is "text" or "json". Default: "text".
	Format string `toml:"format"`
}

// Default is the configuration of a file that sets nothing. It lacks Name, and
// what an HSM needs.
func Default() *Host {
	return &Host{
		State:  "/var/lib/conseal",
		Roster: "/etc/conseal/roster.toml",
		Listen: Listen{
			Address:     "0.0.0.0:7443",
			SignSocket:  "/run/conseal/sign.sock",
			AdminSocket: "/run/conseal/admin.sock",
		},
		Protector: Protector{
			Kind: "tpm",
			TPM: TPM{
				Device:     "device:/dev/tpmrm0",
				PCRs:       []int{0, 2, 4, 7},
				NVRoot:     0x01800600,
				NVCounter:  0x01800601,
				NVReceipts: 0x01800602,
				EventLog:   "/sys/kernel/security/tpm0/binary_bios_measurements",
				SRKHandle:  0x81000001,
				Timeout:    30 * time.Second,
			},
			HSM: HSM{
				Modules: []string{}, Method: "aes-gcm", MaxSessions: 8, Timeout: 10 * time.Second,
				Environment: []string{"SOFTHSM2_CONF", "ChrystokiConfigurationPath", "NFAST_HOME", "CS_PKCS11_R3_CFG",
					"YUBIHSM_PKCS11_CONF", "TPM2_PKCS11_STORE", "KMS_PKCS11_CONFIG"},
			},
		},
		Limits: Limits{
			Message:         1 << 20,
			SignDeadline:    30 * time.Second,
			KeygenDeadline:  2 * time.Minute,
			SessionsPerPeer: 64,
			PeerRate:        5000,
			EpochsPerPeer:   1000,
			ErasuresPerHour: 2,
			CallerRate:      1000,
			Presignatures:   4,
		},
		Log: Log{Level: "info", Format: "text"},
	}
}

// option is one key of [Host] that holds a value.
type option struct {
	key    string
	value  reflect.Value // settable
	hidden bool          // a wrong value may be a PIN: errors do not repeat it
}

// env is the variable that overrides the key.
func (o option) env() string { return envName(o.key) }

// options lists the keys of h, in order.
func (h *Host) options() []option { return optionsOf(reflect.ValueOf(h).Elem(), "") }

func optionsOf(v reflect.Value, base string) []option {
	var all []option
	for f, field := range v.Fields() {
		name := f.Tag.Get("toml")
		switch {
		case name == "":
		case f.Type.Kind() == reflect.Struct:
			all = append(all, optionsOf(field, join(base, name))...)
		default:
			all = append(all, option{join(base, name), field, f.Tag.Get("hidden") != ""})
		}
	}
	return all
}

// Load reads the configuration in the file at path and in the environment, and
// checks it as [Host.Check] does. The error is [Problems].
func Load(path string) (*Host, error) {
	r := newReport(path)
	r.environment(Default().options(), os.Environ())
	b := r.read(path)
	doc := r.parse(b, reflect.TypeFor[Host]())
	if doc == nil {
		return nil, r.err()
	}
	h := Default()
	h.fill(r, b)
	h.check(r)
	if err := r.err(); err != nil {
		return nil, err
	}
	return h, nil
}
